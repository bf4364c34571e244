//! The command line, the defaults, and every good form of a setting.

mod common;
use common::*;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(binary())
        .env_clear()
        .args(arguments)
        .output()
        .expect("run ai-mux")
}

#[test]
fn help_and_version_go_to_standard_output() {
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let text = String::from_utf8_lossy(&help.stdout);
    assert!(
        text.contains("--config") && text.contains("--version"),
        "{text}"
    );
    let version = run(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    let text = String::from_utf8_lossy(&version.stdout);
    assert_eq!(text.trim(), format!("ai-mux {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_bad_command_line_is_2() {
    for arguments in [
        &["--nonsense"][..],
        &["--config"],
        &["serve"],
        &["-c", "x"],
        &["--config", "a", "b"],
        &["--listen", ":8080"],
        &["--config", "a", "--config", "b"],
    ] {
        let run = run(arguments);
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(!said.is_empty() && run.stdout.is_empty(), "{arguments:?}");
    }
}

/// Starts on a file with this name, and with the text that is made of the usual configuration.
fn start(up: &Upstream, name: &str, text: impl Fn(&Value) -> String) -> Mux {
    let setup = Setup::new(up);
    let text = text(&setup.config);
    let path = setup.write(name, &text);
    let mut command = Command::new(binary());
    command
        .env_clear()
        .env("HOME", &setup.folder.0)
        .arg("--config")
        .arg(path);
    let mut mux = Mux::spawn(&mut command, text, setup);
    mux.wait_log("listening on ");
    mux.addr = mux.addrs()[0];
    mux
}

#[test]
fn json_and_yaml_say_the_same() {
    let up = Upstream::plain();
    for mark in ["", "\u{feff}"] {
        let json = start(&up, "config.json", |config| format!("{mark}{config}"));
        assert_eq!(json.message().status, 200);
    }
    for name in ["config.yaml", "config.yml", "config"] {
        let yaml = start(&up, name, |config| {
            format!(
                "# A comment\n---\n{}",
                serde_yaml::to_string(config).expect("YAML")
            )
        });
        assert_eq!(yaml.message().status, 200, "{name}");
    }
}

/// The forms that the Go program's documentation has; its reader took levels in capitals, too.
#[test]
fn a_file_for_the_go_program_works() {
    let up = Upstream::plain();
    let mux = start(&up, "config.yaml", |config| {
        let [state_dir, providers, users] = ["state_dir", "providers", "users"].map(|k| &config[k]);
        format!(
            "# Server\nlisten: \"127.0.0.1:0\"\nstate_dir: {state_dir}\nlog_level: \"INFO\"\n\n\
             # Providers\nproviders:\n  # - chatgpt\n  - {}\n\nusers:\n  - {}\n\n\
             request_timeout: \"1m30s\"\nrefresh_check_interval: 600\n\n\
             tls:\n  enabled: false\n  cert_path: \"\"\n  key_path: \"\"\n",
            providers[0], users[0]
        )
    });
    assert_eq!(mux.message().status, 200);
}

#[test]
fn a_field_without_a_value_is_as_good_as_none() {
    let up = Upstream::plain();
    let mut setup = Setup::new(&up).provider(0, "headers", Value::Null);
    setup.config["proxy"] = Value::Null;
    setup.config["tls"] = Value::Null;
    setup.config["users"][0]["token_file"] = Value::Null;
    let text = serde_yaml::to_string(&setup.config).expect("YAML");
    assert_eq!(text.matches("null").count(), 4, "{text}");
    assert_eq!(setup.start().message().text(), "fine");
    let setup = Setup::new(&up).provider(0, "token_url", Value::Null);
    let setup = setup.env("SSL_CERT_FILE", "");
    assert_eq!(setup.start().message().text(), "fine");
}

#[test]
fn every_form_of_a_duration() {
    let up = Upstream::plain();
    for value in [
        json!("60s"),
        json!("10m"),
        json!("1h30m"),
        json!("1.5h"),
        json!("1500ms"),
        json!(90),
    ] {
        let setup = Setup::new(&up).set("request_timeout", value.clone());
        let setup = setup.set("stream_idle_timeout", value.clone());
        let mux = setup.set("refresh_check_interval", value).start();
        assert_eq!(mux.message().status, 200);
    }
    // A year is the most, a second the least: what is just beyond stands among the bad ones, so
    // that no unit is taken for another.
    for (most, least) in [
        (json!("8760h"), json!("1s")),
        (json!("525600m"), json!("1000ms")),
        (json!(31_536_000), json!(1)),
        (json!("31536000s"), json!("1000000us")),
        (json!("31536000000ms"), json!("1000000000ns")),
        (json!("8759h60m"), json!("0.5s 500ms")),
        (json!("8759.5h 30m"), json!("1.0s")),
    ] {
        let setup = Setup::new(&up).set("request_timeout", most.clone());
        let setup = setup.set("stream_idle_timeout", most);
        let mux = setup.set("refresh_check_interval", least).start();
        assert_eq!(mux.message().status, 200);
    }
}

#[test]
fn a_number_is_seconds() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.cut()
    });
    let mux = Setup::new(&up).set("request_timeout", 1).start();
    assert_eq!(mux.message().status, 504);
    end.advance();
}

fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

#[test]
fn a_port_alone_is_every_interface() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("listen", ":0").start();
    let port = mux.addr.port();
    let here = [
        SocketAddr::from(([127, 0, 0, 1], port)),
        SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)),
    ];
    if !has_ipv6() {
        say("SKIPPED: the half of it that needs IPv6");
    }
    for addr in here.into_iter().filter(|a| a.is_ipv4() || has_ipv6()) {
        let answer = Client::new(addr)
            .request("POST", MESSAGES, &[BEARER], b"{}")
            .answer();
        assert_eq!(answer.status, 200, "{addr}");
    }
    mux.wait_log(" peer=127.0.0.1:"); // not ::ffff:127.0.0.1
}

#[test]
fn a_port_alone_is_every_interface_of_a_host_without_ipv6() {
    let options = "-o /dev/null -e trace=socket -e inject=socket:error=EAFNOSUPPORT:when=1";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: no strace");
    };
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("listen", ":0").shell(&script).start();
    assert!(mux.addr.is_ipv4(), "{}", mux.addr);
}

/// As Go does: what is told to call a name by IPv4 still reaches it.
#[test]
fn of_a_names_addresses_it_takes_ipv4_first() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("listen", "both.test:0");
    let hosts = setup.write("hosts", "::1 both.test\n127.0.0.1 both.test\n");
    let Some(script) = setup::mounting(&hosts, "/etc/hosts") else {
        return say("SKIPPED: only root has an /etc/hosts of its own");
    };
    let mux = setup.shell(&script).start();
    assert!(mux.addr.is_ipv4(), "{}", mux.addr);
}

#[test]
fn a_host_may_be_a_name_or_an_ipv6_address() {
    let up = Upstream::plain();
    for (listen, said) in [("localhost:0", "http://"), ("[::1]:0", "http://[::1]:")] {
        if listen.starts_with('[') && !has_ipv6() {
            return say("SKIPPED: no IPv6 here");
        }
        let mux = Setup::new(&up).set("listen", listen).start();
        assert!(
            mux.log().contains(&format!("listening on {said}")),
            "{}",
            mux.log()
        );
        assert_eq!(mux.message().status, 200, "{listen}");
    }
}

/// What was closed a moment ago keeps no port: a restart takes over from the one before.
#[test]
fn a_port_is_free_again_at_once() {
    let up = Upstream::plain();
    let mut mux = Setup::new(&up).start_unheard();
    let mut client = mux.client();
    let answer = client.request("POST", MESSAGES, &[], b"{}").answer();
    assert_eq!(answer.status, 401);
    assert!(
        client.closed(),
        "by ai-mux first: its end is the one that lingers"
    );
    drop(client);
    assert_eq!(mux.stop(), 0);
    let again = Setup::new(&up).set("listen", mux.addr.to_string()).start();
    assert_eq!(again.message().status, 200);
}

/// Whoever has that port, ai-mux without a configuration asks for it.
#[test]
fn by_default_it_listens_on_8080() {
    let _taken = TcpListener::bind("0.0.0.0:8080");
    let home = Folder::new();
    let login = Login::new("claude", 3600).claude();
    login::save(&home.0.join(".ai-mux"), "claude", &login);
    let mut command = Command::new(binary());
    let run = command.env_clear().env("HOME", &home.0).output();
    let run = run.expect("run ai-mux");
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{said}");
    assert!(said.contains("listen on [::]:8080: "), "{said}");
}

#[test]
fn a_port_that_is_taken_is_1() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let (code, said) = Setup::new(&up)
        .set("listen", mux.addr.to_string())
        .refused();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&mux.addr.to_string()), "{said}");
}

/// Half of the clients would hand their tokens to whoever is there already.
#[test]
fn a_port_that_is_in_use_for_one_kind_of_address() {
    let up = Upstream::plain();
    let Ok(other) = TcpListener::bind("[::1]:0") else {
        return say("SKIPPED: no IPv6 here");
    };
    let port = other.local_addr().expect("an address").port();
    let (code, said) = Setup::new(&up).set("listen", format!(":{port}")).refused();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&port.to_string()), "{said}");
    assert!(said.contains("in use"), "{said}");
}

/// A name server may not be there yet: that is no fault of the configuration.
#[test]
fn a_host_that_has_no_address_is_a_failure_to_start() {
    let up = Upstream::plain();
    let (code, said) = Setup::new(&up).set("listen", "mux.invalid:8080").refused();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("listen on mux.invalid:8080: "), "{said}");
}

#[test]
fn one_process_for_each_state_dir() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let state = mux.state().to_str().expect("text").to_owned();
    let (code, said) = Setup::new(&up).set("state_dir", state.as_str()).refused();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&state), "{said}");
    assert!(said.contains("another ai-mux uses it"), "{said}");
    assert_eq!(mux.message().status, 200);
}

/// As on a network file system without them: then it is no other process that has it.
#[test]
fn a_file_system_without_locks_is_called_that() {
    let options = "-o /dev/null -e trace=flock -e inject=flock:error=ENOLCK";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: needs strace");
    };
    let up = Upstream::plain();
    let (code, said) = Setup::new(&up).shell(&script).refused();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("No locks available"), "{said}");
    assert!(!said.contains("another"), "{said}");
}

/// It is named so that a command which is told works in any folder, whatever is in the name.
#[test]
fn a_relative_state_dir() {
    let up = Upstream::plain();
    for (state, home) in [("it's $HOME", "/nowhere"), ("~/own", ".")] {
        let setup = Setup::bare(&up).set("state_dir", state);
        // The kernel knows where it is by the real path only.
        let folder = setup.folder.0.canonicalize().expect("a folder");
        let script = format!("cd '{}' && exec \"$@\"", folder.display());
        let mux = setup.env("HOME", home).shell(&script).start();
        let said = mux.message().error();
        let (_, told) = said.split_once("log in with: ").expect("a command");
        let (make, _) = told.split_once(" && ").expect("what makes the folder");
        let made = Command::new("sh").args(["-c", make]).status();
        assert!(made.expect("run sh").success(), "{make}");
        let state = folder.join(state.trim_start_matches("~/"));
        let login = up.login("claude", 3600).claude();
        fs::write(state.join("claude/.credentials.json"), login.to_string()).expect("save a login");
        assert_eq!(mux.message().status, 200);
    }
}

#[test]
fn a_killed_process_leaves_its_state_dir_free() {
    let up = Upstream::plain();
    let mut mux = Mux::start(&up);
    mux.signal(Signal::KILL);
    assert_eq!(mux.wait_exit(), -9);
    let state = mux.state().to_str().expect("text").to_owned();
    let again = Setup::new(&up).set("state_dir", state).start();
    assert_eq!(again.message().status, 200);
}

#[test]
fn the_state_dir_is_made_and_is_private() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).set("state_dir", "~/deep/er/state");
    let mux = setup.start();
    let path = mux.folder.0.join("deep/er/state");
    let mode = fs::metadata(&path).expect("a folder").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    login::save(&path, "claude", &up.login("claude", 3600).claude());
    assert_eq!(mux.message().status, 200);
}

#[test]
fn by_default_it_lives_in_the_home_folder_and_logs_at_info() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).set("state_dir", Value::Null);
    let home = setup.folder.0.join(".ai-mux");
    login::save(&home, "chatgpt", &up.login("chatgpt", 3600).codex());
    let mux = setup.start();
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    mux.wait_log("status=200");
    assert_eq!(mux.log_lines("DEBUG"), [""; 0]);
}

/// With no list, every provider whose file exists; the others have no route.
#[test]
fn without_providers_it_finds_the_logins_itself() {
    let up = Upstream::plain();
    for list in [Value::Null, json!([])] {
        let setup = Setup::bare(&up).set("providers", list);
        let mux = setup
            .save("chatgpt", &up.login("chatgpt", 3600).flat())
            .start();
        let health = mux.client().request("GET", "/healthz", &[], b"").answer();
        assert!(
            health.text().contains("chatgpt") && !health.text().contains("claude"),
            "{}",
            health.text()
        );
        assert_eq!(mux.message().status, 404);
    }
    // A folder that ai-mux may not look into is there all the same, and it says how to open it.
    let setup = Setup::new(&up).set("providers", Value::Null);
    let folder = setup.state().join("claude");
    let allow = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode));
    allow(0o000).expect("chmod");
    let mux = setup.unprivileged().start();
    let answer = mux.message();
    assert_eq!(answer.status, 503);
    assert!(answer.error().contains("chown"), "{}", answer.text());
    allow(0o700).expect("chmod");
}

#[test]
fn few_descriptors_lower_the_workers_with_a_warning() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 500);
    let mux = setup.shell("ulimit -n 256 && exec \"$@\"").start();
    let warnings = mux.log_lines("WARN");
    assert!(
        warnings.iter().any(|line| line.contains("workers")),
        "{warnings:?}"
    );
    assert_eq!(mux.message().status, 200);
}

/// Of the few, some are for clients: with every worker busy, somebody still hears how it is.
#[test]
fn with_few_descriptors_there_is_room_for_more_clients_than_workers() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.respond(200, &[], b"late")
    });
    let setup = Setup::new(&up).set("workers", 500);
    let mux = setup.shell("ulimit -n 64 && exec \"$@\"").start();
    let warning = mux.log_lines(" workers, not 500").pop().expect("a warning");
    let workers = warning.split(" carries ").nth(1);
    let workers = workers.and_then(|rest| rest.split(' ').next()?.parse().ok());
    let mut busy: Vec<_> = (0..workers.expect("a number"))
        .map(|_| mux.client())
        .collect();
    for client in &mut busy {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    up.wait(busy.len(), |_| true);
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health.status, 200);
    go.advance();
    for client in &mut busy {
        assert_eq!(client.answer().text(), "late");
    }
}

/// Longer than the address of a socket can be.
#[test]
fn a_state_dir_may_have_a_long_path() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).set("state_dir", format!("~/{}", "long/".repeat(30)));
    assert_eq!(setup.start().message().status, 503);
}

/// At its end, tiny_http would connect to whoever has the name of its socket by then, and remove that.
#[test]
fn the_name_of_its_socket_is_free_again_once_it_has_started() {
    let up = Upstream::plain();
    let mut mux = Setup::bare(&up).start();
    let inner = mux.state().join("inner");
    fs::create_dir(&inner).expect("free");
    let other = inner.join("socket");
    fs::write(&other, "another's").expect("free");
    mux.stop();
    assert!(other.exists(), "removed at the end");
}

#[test]
fn plain_http_may_go_to_each_loopback_address() {
    let up = Upstream::plain();
    let url = format!("http://localhost:{}/anthropic", up.addr.port());
    let mux = Setup::new(&up).provider(0, "base_url", url).start();
    assert_eq!(mux.message().status, 200);
    for url in ["http://[::1]:9", "http://127.255.255.254:9"] {
        Setup::new(&up).provider(0, "base_url", url).start();
    }
}
