//! A bad configuration stops the start with exit 2 and one line that names the file, the field, what was found and
//! what would be right. A secret that was found is not shown.

mod common;
use common::*;
use std::fs;
use std::process::Command;

/// Runs it on this text as its configuration: its exit code and what it said.
fn run(name: &str, text: &str) -> (i32, String) {
    let up = Upstream::plain();
    let setup = Setup::bare(&up);
    let path = setup.write(name, text);
    let mut command = Command::new(binary());
    command
        .env_clear()
        .env("HOME", &setup.folder.0)
        .arg("--config")
        .arg(path);
    let mut mux = Mux::spawn(&mut command, text.to_owned(), setup);
    (mux.wait_exit(), mux.whole_log())
}

/// Each configuration, and what the line must say beside the file's name.
const TABLE: &[(&str, &[&str])] = &[
    ("listne: ':8080'", &["listne", "listen"]),
    ("listne:", &["listne", "listen"]),
    (
        "stream_idle_timout: 5m",
        &["stream_idle_timout", "stream_idle_timeout"],
    ),
    ("\"list\\nne\": 1", &["listen"]),
    ("listen: 8080", &["listen", "found 8080,"]),
    ("listen: localhost", &["listen", "localhost"]),
    ("listen: ':99999'", &["listen", ":99999"]),
    ("listen: ':+80'", &["listen", "+80"]),
    ("listen: ':http'", &["listen", "http"]),
    ("listen: ''", &["listen"]),
    ("listen: 'http://127.0.0.1:80'", &["listen", "HOST:PORT"]),
    ("listen: '*:80'", &["listen", "HOST:PORT"]),
    ("listen: '[]:80'", &["listen", "HOST:PORT"]),
    ("listen: \"a\\nb:80\"", &["listen", "HOST:PORT"]),
    ("listen: '::1'", &["listen", "::1", "HOST:PORT"]),
    ("listen: '::1:80'", &["listen", "HOST:PORT", "[IPV6]:PORT"]),
    ("listen: '127.0.0.1]:80'", &["listen", "HOST:PORT"]),
    ("listen: '[[::1]]:80'", &["listen", "HOST:PORT"]),
    ("listen: !env ':80'", &["listen", "tag", "line 1"]),
    ("state_dir: 5", &["state_dir", "found 5,"]),
    ("state_dir: ''", &["state_dir", "path"]),
    ("state_dir: [a]", &["state_dir"]),
    ("state_dir: ~alice/x", &["state_dir", "~alice/x"]),
    (
        "log_level: loud",
        &["log_level", "loud", "debug", "info", "warn", "error"],
    ),
    ("log_level: 3", &["log_level", "found 3,"]),
    ("log_level: OFF", &["log_level", "OFF"]),
    ("log_level: Trace", &["log_level", "Trace"]),
    ("providers: claude", &["providers"]),
    (
        "providers: [gemini]",
        &["providers", "gemini", "claude", "chatgpt"],
    ),
    ("providers: [claude, claude]", &["providers", "claude"]),
    (
        "providers: [claude, {name: claude}]",
        &["providers", "claude"],
    ),
    ("providers: [{headers: {}}]", &["providers", "name"]),
    (
        "providers: [{name: gemini}]",
        &["providers", "gemini", "claude"],
    ),
    (
        "providers: [{name: claude, url: x}]",
        &["providers", "url", "base_url"],
    ),
    (
        "providers: [{name: claude, base_url: 5}]",
        &["base_url", "found 5,"],
    ),
    (
        "providers: [{name: claude, base_url: nonsense}]",
        &["base_url", "nonsense"],
    ),
    (
        "providers: [{name: claude, base_url: 'http://example.org'}]",
        &["base_url", "http://example.org", "https"],
    ),
    (
        "providers: [{name: claude, base_url: 'http://127.0.0.1.example.org'}]",
        &["base_url", "https"],
    ),
    (
        "providers: [{name: claude, base_url: 'http://192.168.1.1'}]",
        &["base_url", "https"],
    ),
    (
        "providers: [{name: claude, base_url: 'ftp://localhost'}]",
        &["base_url", "ftp", "https"],
    ),
    (
        "providers: [{name: claude, base_url: 'https://example.org:99999'}]",
        &["base_url", ":99999"],
    ),
    (
        "providers: [{name: claude, base_url: 'https://example.org:'}]",
        &["base_url"],
    ),
    (
        "providers: [{name: claude, token_url: 'https://example.org:0'}]",
        &["token_url"],
    ),
    (
        "providers: [{name: claude, token_url: 'http://example.org/token'}]",
        &["token_url", "https"],
    ),
    ("providers: [{name: claude, headers: [a]}]", &["headers"]),
    (
        "providers: [{name: claude, headers: {x-a: 5}}]",
        &["headers"],
    ),
    (
        "providers: [{name: claude, headers: {'x a': b}}]",
        &["headers", "\"x\" "],
    ),
    (
        "providers: [{name: claude, headers: {'': b}}]",
        &["headers"],
    ),
    (
        "providers: [{name: claude, headers: {x-a: b, X-A: c}}]",
        &["headers", "once"],
    ),
    ("users: alice", &["users"]),
    ("users: [alice]", &["users"]),
    (
        "users: [{name: alice}]",
        &["users", "alice", "found \"\"", "token_file"],
    ),
    (
        "users: [{name: '-', token: Sk4rTz9wQp2mVx7n}]",
        &["users", "name"],
    ),
    (
        "users: [{name: \"a\\nb\", token: Sk4rTz9wQp2mVx7n}]",
        &["users", "name"],
    ),
    ("users: [{token: Sk4rTz9wQp2mVx7n}]", &["users", "name"]),
    (
        "users: [{name: alice, tokn: Sk4rTz9wQp2mVx7n}]",
        &["users", "tokn", "token"],
    ),
    (
        "users: [{name: alice, token: Sk4rTz9wQp2mVx7}]",
        &["users", "token", "16+"],
    ),
    (
        "users: [{name: alice, token: 1234567890123456}]",
        &["users", "token", "a text"],
    ),
    (
        "users: [{name: alice, token: 42}]",
        &["users", "token", "not shown"],
    ),
    (
        "users: [{name: alice, token: Sk4rTz9wQp2mVx7n, token_file: /dev/null}]",
        &["users", "alice", "token_file", "not both"],
    ),
    (
        "users: [{name: alice, token: !secret Sk4rTz9wQp2mVx7n}]",
        &["users[0].token", "tag"],
    ),
    (
        "users: [{name: alice, token_file: /dev/null}]",
        &[
            "users",
            "alice",
            "token_file",
            "/dev/null",
            "found \"\"",
            "16+",
        ],
    ),
    (
        "users: [{name: alice, token_file: /nowhere/at/all}]",
        &["users", "alice", "token_file", "/nowhere/at/all"],
    ),
    (
        "users: [{name: alice, token: Sk4rTz9wQp2mVx7n}, {name: alice, token: Jd8fHs6gBc5yLq3w}]",
        &["users", "alice"],
    ),
    (
        "users: [{name: alice, token: Sk4rTz9wQp2mVx7n}, {name: bob, token: Sk4rTz9wQp2mVx7n}]",
        &["users", "token", "expected once"],
    ),
    (
        "users: [{name: '', token: Sk4rTz9wQp2mVx7n}]",
        &["users", "name"],
    ),
    ("request_timeout: soon", &["request_timeout", "soon", "60s"]),
    ("request_timeout: -5", &["request_timeout", "found -5,"]),
    ("request_timeout: 0", &["request_timeout", "found 0,"]),
    ("request_timeout: 1.5", &["request_timeout", "found 1.5,"]),
    (
        "request_timeout: 5 parsecs",
        &["request_timeout", "parsecs"],
    ),
    ("request_timeout: 1M", &["request_timeout", "1M"]),
    ("request_timeout: 2 days", &["request_timeout"]),
    ("request_timeout: 1month", &["request_timeout", "1month"]),
    ("request_timeout: 9000h", &["request_timeout", "9000h"]),
    // Just more than a year, in each unit.
    ("request_timeout: 8761h", &["found \"8761h\","]),
    ("request_timeout: 8760.5h", &["found \"8760.5h\","]),
    ("request_timeout: 8759h61m", &["found \"8759h61m\","]),
    ("request_timeout: 525601m", &["found \"525601m\","]),
    ("request_timeout: 31536001s", &["found \"31536001s\","]),
    ("request_timeout: 31536001", &["found 31536001,"]),
    ("request_timeout: 31536000001ms", &["31536000001ms"]),
    // On which humantime panics.
    (
        "request_timeout: 5124095576030431h15s1000ms",
        &["request_timeout", "5124095576030431h"],
    ),
    ("stream_idle_timeout: [1]", &["stream_idle_timeout"]),
    ("stream_idle_timeout: 0s", &["stream_idle_timeout"]),
    (
        "refresh_check_interval: 500ms",
        &["refresh_check_interval", "500ms", "at least 1s"],
    ),
    // Just less than a second, in each unit.
    ("refresh_check_interval: 0.9s", &["found \"0.9s\","]),
    ("refresh_check_interval: 999ms", &["found \"999ms\","]),
    ("refresh_check_interval: 999999us", &["found \"999999us\","]),
    ("refresh_check_interval: 999999999ns", &["999999999ns"]),
    (
        "refresh_check_interval: 0",
        &["refresh_check_interval", "found 0,"],
    ),
    ("workers: 0", &["workers", "found 0,"]),
    ("workers: -1", &["workers", "found -1,"]),
    ("workers: many", &["workers"]),
    ("workers: !!int x", &["workers"]),
    ("workers: !x 5", &["workers"]),
    ("workers: !x ~", &["workers"]),
    ("!x workers: 5", &["workers", "unknown"]),
    ("workers: 1.5", &["workers", "found 1.5,"]),
    ("proxy: 5", &["proxy"]),
    ("proxy: 'gopher://localhost'", &["proxy"]),
    ("proxy: nonsense://", &["proxy"]),
    ("tls: true", &["tls"]),
    ("tls: !x {enabled: false}", &["tls"]),
    ("providers: [!x claude]", &["providers"]),
    ("providers: [!x {name: claude}]", &["providers"]),
    (
        "providers: [{name: claude, headers: {x-a: !x b}}]",
        &["headers"],
    ),
    ("tls: {enabled: maybe}", &["tls.enabled"]),
    ("tls: {enabled: true}", &["tls", "cert_path"]),
    ("tls: {enabled: true, cert_path: /x}", &["tls", "key_path"]),
    (
        "tls: {enabled: true, cert: /x}",
        &["tls", "cert", "cert_path"],
    ),
    ("[1, 2]", &[]),
    ("just words", &[]),
    ("listen: [", &[]),
    ("listen: a\nlisten: b", &["listen"]),
    ("log_level: info\nlog_level: warn", &["log_level"]),
    ("\tlisten: a", &[]),
];

#[test]
fn each_fault_is_one_clear_line() {
    for (text, words) in TABLE {
        let (code, said) = run("wrong.yaml", text);
        assert_eq!(code, 2, "{text}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{text}: {said}");
        assert!(said.starts_with("ai-mux: "), "{text}: {said}");
        assert!(said.contains("wrong.yaml"), "{text}: {said}");
        for word in *words {
            assert!(said.contains(word), "{text}: {word:?} is not in {said}");
        }
    }
}

/// It would be refused at each request.
#[test]
fn a_header_that_fits_no_request_is_no_header() {
    let long = "x".repeat(9000);
    let text = format!("providers: [{{name: claude, headers: {{x-a: {long}}}}}]");
    let (code, said) = run("wrong.yaml", &text);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("\"x-a\"") && said.contains("8 KiB"), "{said}");
}

/// A map of headers has a largest size, above which it panics.
#[test]
fn there_are_not_more_headers_than_a_request_may_have() {
    let many: Vec<_> = (0..30_000).map(|n| format!("x-{n}: b")).collect();
    let text = format!(
        "providers: [{{name: claude, headers: {{{}}}}}]",
        many.join(", ")
    );
    let (code, said) = run("wrong.yaml", &text);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("\"x-100\"") && said.contains("100 in all"),
        "{said}"
    );
}

#[test]
fn what_was_found_in_a_secret_field_is_not_shown() {
    let folder = Folder::new();
    let short = fs::write(folder.0.join("short"), "Pw5xKt");
    short.expect("write a file");
    let short = folder.0.join("short");
    for text in [
        "users: [{name: alice, token: Pw5xKt}]".to_owned(),
        "users: [Pw5xKtRb8zHnVc3mXd]".to_owned(),
        "users: Pw5xKtRb8zHnVc3mXd".to_owned(),
        "users: {alice: Pw5xKtRb8zHnVc3mXd}".to_owned(),
        "providers: [{name: claude, headers: Pw5xKt}]".to_owned(),
        "Pw5xKtRb8zHnVc3mXd".to_owned(),
        "[Pw5xKtRb8zHnVc3mXd]".to_owned(),
        "users: [{name: alice, token: [Pw5xKtRb8zHn]}]".to_owned(),
        "users: [{name: alice, token: {Pw5xKtRb8zHn: 1}}]".to_owned(),
        "users: [{name: alice, token: 'Pw5xKt Rb8zHn Vc3mXd'}]".to_owned(),
        "users: [{name: alice, token: \"Pw5xKtRb8zHn\\nVc3mXd\"}]".to_owned(),
        "users: [{name: alice, token: Pw5xKtRb8zHnéVc3mXd}]".to_owned(),
        "users: [{name: a, token: Pw5xKtRb8zHnVc3mXd}, {name: b, token: Pw5xKtRb8zHnVc3mXd}]"
            .to_owned(),
        format!("users: [{{name: alice, token_file: {}}}]", short.display()),
        "users: [{name: alice, token_file: Pw5xKtRb8z/HnVc3mXd=}]".to_owned(),
        "users: [{name: alice, token: 555666777888999000}]".to_owned(),
        "users: [{name: alice, token_file: 555666777888999000}]".to_owned(),
        "users: [{name: alice, token: 555666777888999000555666777}]".to_owned(),
        "providers: [{name: claude, headers: {x-a: -555666777888999000555666777}}]".to_owned(),
        "providers: [{name: claude, base_url: 'https://h/?key=Pw5xKt'}]".to_owned(),
        "tls: {enabled: true, key_path: /x, cert_path: \"-----BEGIN\\nPw5xKt\"}".to_owned(),
        "tls: {enabled: true, key_path: /x, cert_path: -----BEGIN A KEY-----\n Pw5xKt}".to_owned(),
        "tls: {enabled: true, key_path: /x, cert_path: \"Rb8zHn\\nPw5xKt\"}".to_owned(),
        "providers: [{name: claude, base_url: 'https://h/#key=Pw5xKt'}]".to_owned(),
        "providers: [{name: claude, headers: {x-a: [Pw5xKt]}}]".to_owned(),
        "providers: [{name: claude, headers: {authorization: Pw5xKt}}]".to_owned(),
        "providers: [{name: claude, headers: {x-a: \"Pw5xKt\\r\\nx: y\"}}]".to_owned(),
        "users: [{name: alice, token:Pw5xKtRb8zHnVc3mXd}]".to_owned(),
        "users: [{name: alice, token:Pw5xKt}]".to_owned(),
        "users: [{token:Pw5xKtRb8zHnVc3mXd, name: alice}]".to_owned(),
        "users: [{Pw5xKtRb8zHnVc3mXd: 1, name: alice}]".to_owned(),
        "users: [{\"Pw5xKtRb8zHn\\nVc3mXd\": 1, name: alice}]".to_owned(),
        "providers: [{name: claude, headers: {x-a:Pw5xKt}}]".to_owned(),
        "providers: [{name: claude, headers: {x-a:Pw5xKt: 1}}]".to_owned(),
        "users: [{name: alice, token: !!int Pw5xKtRb8zHnVc3mXd}]".to_owned(),
        "users: {Pw5xKtRb8zHnVc3mXd: a, Pw5xKtRb8zHnVc3mXd: b}".to_owned(),
        "users: {Pw5xKt: a, Pw5xKt: b}".to_owned(),
        "users: [{name: alice, token:Pw5xKtRb8zHnVc3mXd: {a: b, a: c}}]".to_owned(),
        "users: [{name: alice, token:Pw5xKtRb8zHnVc3mXd: !!int x}]".to_owned(),
        "users: [{5556667778889990: a, 5556667778889990: b}]".to_owned(),
        "proxy: {'http://user:Pw5xKt@localhost': 5550001112223334445556667778889990}".to_owned(),
        "users: {a_pw_secret_token: a, a_pw_secret_token: b}".to_owned(),
        "users: [{name: alice, token: !!int pw_secret_token}]".to_owned(),
        "users: [{name: {token: Pw5xKtRb8zHnVc3mXd}}]".to_owned(),
        "listen: {users: [{name: alice, token: Pw5xKtRb8zHnVc3mXd}]}".to_owned(),
        "workers: [{token: Pw5xKtRb8zHnVc3mXd}]".to_owned(),
        "providers: [{name: claude, base_url: {headers: {x-a: Pw5xKt}}}]".to_owned(),
        "providers: [{name: {headers: {x-a: Pw5xKt}}}]".to_owned(),
        "providers: [{name: claude, headers: {x-a=Pw5xKt: }}]".to_owned(),
        "providers: [{name: claude, headers: {x-a Pw5xKt}}]".to_owned(),
        "providers: [{name: claude, headers: {'x-a = Pw5xKt': 1}}]".to_owned(),
        "users: [{name: alice, Pw5xKtRb8zHnVc3mXd: !x y}]".to_owned(),
        "users: [{name: alice, token:Pw5xKtRb8zHnVc3mXd: !x y}]".to_owned(),
        "proxy: {'http://user:Pw5xKt@localhost': !x y}".to_owned(),
        "providers: [{name: claude, headers: {'Bearer Pw5xKt': !x y}}]".to_owned(),
        "users: [{name: alice, token: !x Pw5xKtRb8zHnVc3mXd}]".to_owned(),
        "proxy: !!int Pw5xKtRb8zHn".to_owned(),
        "proxy: Pw5xKtRb8zHn".to_owned(),
        "proxy: [Pw5xKtRb8zHn]".to_owned(),
        "proxy: 'gopher://user:Pw5xKt@localhost:1'".to_owned(),
        "proxy: 'http://user:Pw5xKt@:no'".to_owned(),
        "providers: [{name: claude, base_url: 'http://user:Pw5xKt@example.org'}]".to_owned(),
    ] {
        let (code, said) = run("wrong.yaml", &text);
        assert_eq!(code, 2, "{text}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{text}: {said}");
        for secret in ["Pw5xKt", "Rb8zHn", "Vc3mXd", "666777", "pw_secret"] {
            assert!(!said.contains(secret), "{text}: {said}");
        }
    }
}

#[test]
fn headers_of_authentication_account_framing_and_the_hop_cannot_be_configured() {
    for name in [
        "Authorization",
        "x-api-key",
        "Cookie",
        "ChatGPT-Account-Id",
        "Host",
        "Content-Length",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "TE",
        "Trailer",
        "Upgrade",
        "Expect",
        "Proxy-Authorization",
        "Proxy-Connection",
    ] {
        let text = format!("providers: [{{name: chatgpt, headers: {{{name}: x}}}}]");
        let (code, said) = run("wrong.yaml", &text);
        assert_eq!(code, 2, "{name}: {said}");
        assert!(
            said.contains("headers") && said.contains(name),
            "{name}: {said}"
        );
    }
}

#[test]
fn a_json_file_is_held_to_the_same_rules() {
    for (text, word) in [
        ("{\"workers\": 0}", "workers"),
        ("{\"worker\": 1}", "worker"),
        ("{\"listen\": \":8080\",}", "line 1 column 20"),
        (
            "{\"workers\": 5 6}",
            "expected `,` or `}` at line 1 column 15",
        ),
        ("workers: 5", "wrong.json"),
        (
            "{\"users\": [{\"name\": \"alice\", \"token\": \"Pw5xKt\"}]}",
            "token",
        ),
    ] {
        let (code, said) = run("wrong.json", text);
        assert_eq!(code, 2, "{text}: {said}");
        assert!(
            said.contains("wrong.json") && said.contains(word),
            "{text}: {said}"
        );
        assert!(!said.contains("Pw5xKt"), "{said}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = Folder::new();
    for path in [folder.0.join("missing.yaml"), folder.0.clone()] {
        let mut command = Command::new(binary());
        let run = command
            .env_clear()
            .arg("--config")
            .arg(&path)
            .output()
            .expect("run ai-mux");
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{said}");
        assert!(
            said.contains(path.to_str().expect("text")) && said.lines().count() == 1,
            "{said}"
        );
    }
}

#[test]
fn no_credential_at_all_is_an_error_that_names_the_paths() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).set("providers", json!([]));
    let paths = ["claude", "chatgpt"].map(|name| login::path(&setup.state(), name));
    let (code, said) = setup.refused();
    assert_eq!(code, 1, "{said}");
    for path in paths {
        assert!(said.contains(path.to_str().expect("text")), "{said}");
    }
}
