//! Whatever happens while a login is refreshed, its file is whole at every moment, and no login is lost that
//! could have been kept.

mod common;
use common::*;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

const PROVIDERS: [&str; 2] = ["claude", "chatgpt"];

fn below(limit: u64) -> u64 {
    RandomState::new().hash_one(Instant::now()) % limit.max(1)
}

/// With its logins in a folder that outlives the process.
fn with_state(up: &Upstream, state: &Path) -> Setup {
    Setup::bare(up).set("state_dir", state.to_str().expect("a path of text"))
}

/// A login as ai-mux finds it, with a neighbour that is none of its business.
fn file(provider: &str, login: &Login) -> Value {
    let mut file = match provider {
        "claude" => login.claude(),
        _ => login.flat(),
    };
    file["neighbour"] = json!({"kept": true});
    file
}

/// Access and refresh token, where each form keeps them.
fn tokens(provider: &str, file: &Value) -> [String; 2] {
    let parts = match provider {
        "claude" => ["/claudeAiOauth/accessToken", "/claudeAiOauth/refreshToken"],
        _ => ["/access_token", "/refresh_token"],
    };
    parts.map(|part| {
        file.pointer(part)
            .and_then(Value::as_str)
            .expect("a token")
            .to_owned()
    })
}

fn expire(state: &Path, provider: &str) {
    let mut file = login::read(state, provider);
    match provider {
        "claude" => file["claudeAiOauth"]["expiresAt"] = json!((now() - 10) * 1000),
        _ => file["expires_at"] = json!(now() - 10),
    }
    login::save(state, provider, &file);
}

/// What all of those who watch a chain of kills have seen.
#[derive(Default)]
struct Seen {
    /// Every login that was ever issued: the refresh token of each access token.
    issued: Mutex<HashMap<String, String>>,
    /// The access token that each refresh token was spent for.
    spent: Mutex<HashMap<String, String>>,
    /// Access tokens that were on disk at some time, and that upstream was asked with.
    saved: Mutex<HashSet<String>>,
    used: Mutex<HashSet<String>>,
    unsaved: AtomicUsize,
    /// Held while the vendor decides on a refresh.
    deciding: Mutex<()>,
    over: AtomicBool,
}

impl Seen {
    fn issue(&self, tokens: [String; 2]) {
        let [access, refresh] = tokens;
        lock(&self.issued).insert(access, refresh);
    }

    /// Reads a file that must be whole.
    fn read(&self, state: &Path, provider: &str) -> [String; 2] {
        let tokens = tokens(provider, &login::read(state, provider));
        lock(&self.saved).insert(tokens[0].clone());
        tokens
    }

    /// For the upstream: whether a token that it is asked with has been saved.
    fn asked(&self, state: &Path, req: &Request) {
        self.read(state, req.provider());
        if !lock(&self.saved).contains(req.bearer()) {
            self.unsaved.fetch_add(1, Ordering::SeqCst);
        }
        lock(&self.used).insert(req.bearer().to_owned());
    }

    /// Reads both files over and over, as the vendors' tools might at any moment.
    fn watch(&self, state: &Path) -> usize {
        let mut reads = 0;
        while !self.over.load(Ordering::SeqCst) {
            for provider in PROVIDERS {
                self.read(state, provider);
                reads += 1;
            }
            thread::sleep(Duration::from_micros(50));
        }
        reads
    }
}

/// Ends the watch, by a panic too: a scope waits for its threads even then.
struct Watched<'a>(&'a Seen);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

/// A stand-in whose token endpoint takes its time and remembers what it answered.
fn vendor(seen: &Arc<Seen>, state: &Path) -> Upstream {
    let (by_requests, by_refreshes) = (seen.clone(), seen.clone());
    let state = state.to_owned();
    let up = Upstream::start(move |req, conn| {
        by_requests.asked(&state, req);
        conn.respond(200, &[], b"fine")
    });
    let shared = up.shared.clone();
    up.on_refresh(move |req, conn| {
        thread::sleep(Duration::from_micros(below(4000)));
        let body: Value = serde_json::from_slice(&req.body)?;
        let spent = body["refresh_token"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let _turn = lock(&by_refreshes.deciding);
        if is_gone(conn)? {
            return conn.cut().map(|()| true);
        }
        let Some(answer) = shared.vendors.renew(req, 3600) else {
            return conn
                .json(400, &json!({"error": "invalid_grant"}))
                .map(|()| true);
        };
        let text = |key: &str| answer[key].as_str().expect("a token").to_owned();
        by_refreshes.issue([text("access_token"), text("refresh_token")]);
        lock(&by_refreshes.spent).insert(spent, text("access_token"));
        conn.json(200, &answer).map(|()| true)
    });
    up
}

/// Whether who asks has been killed by now: a vendor may hear that, or decide nonetheless, but not both.
fn is_gone(conn: &Conn) -> io::Result<bool> {
    let socket = conn.wire.socket();
    socket.set_nonblocking(true)?;
    let peeked = socket.peek(&mut [0]);
    socket.set_nonblocking(false)?;
    Ok(!matches!(peeked, Err(e) if e.kind() == io::ErrorKind::WouldBlock))
}

/// Asks both providers over and over, until the process is gone.
fn load(mux: &Mux) {
    let requests = [MESSAGES, RESPONSES].map(|target| {
        format!("POST {target} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\ncontent-length: 2\r\n\r\n{{}}")
    });
    let Ok(socket) = TcpStream::connect(mux.addr) else {
        return;
    };
    let mut client = Client::on(http::Wire::plain(socket));
    for request in requests.iter().cycle() {
        let answered = client.wire.send(request.as_bytes()).is_ok()
            && matches!(client.try_head(), Ok(Some(_)))
            && client.body().is_ok();
        if !answered {
            return;
        }
    }
}

/// Starts it with both logins expired, under load, and kills it after `delay`.
fn run_and_kill(up: &Upstream, state: &Path, delay: Duration) {
    for provider in PROVIDERS {
        expire(state, provider);
    }
    // Quiet, for every line of every log is searched for secrets.
    let setup = with_state(up, state).set("log_level", "error");
    let mux = setup.set("workers", 8).start_unheard();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| load(&mux));
        }
        thread::sleep(delay);
        mux.signal(Signal::KILL);
    });
}

/// `AI_MUX_KILLS` says how many kills; 25 if it is not set.
#[test]
fn kill_9_at_random_moments_of_refreshes_under_load() {
    let kills = env::var("AI_MUX_KILLS").map_or(25, |text| text.parse().expect("a number"));
    let folder = Folder::new();
    let state = &folder.0;
    let seen = Arc::new(Seen::default());
    let up = vendor(&seen, state);
    let log_in = |provider: &str| {
        let file = file(provider, &up.login(provider, -10));
        seen.issue(tokens(provider, &file));
        login::save(state, provider, &file);
    };
    for provider in PROVIDERS {
        log_in(provider);
    }

    // How long both refreshes take from the start on, when nobody disturbs them.
    let mux = with_state(&up, state).start();
    let began = Instant::now();
    for target in [MESSAGES, RESPONSES] {
        assert_eq!(mux.ask("POST", target, &[], b"{}").status, 200);
    }
    let window = began.elapsed();
    drop(mux);

    let (mut early, mut between, mut saved) = (0, 0, 0);
    let reads = thread::scope(|scope| {
        let watched = Watched(&seen);
        let watcher = scope.spawn(|| seen.watch(state));
        for kill in 0..kills {
            let before = PROVIDERS.map(|provider| seen.read(state, provider));
            let delay = Duration::from_micros(below(window.as_micros() as u64));
            run_and_kill(&up, state, delay);
            drop(lock(&seen.deciding));
            for (provider, [old, spent]) in PROVIDERS.into_iter().zip(before) {
                let [access, refresh] = seen.read(state, provider);
                let whole = lock(&seen.issued).get(&access) == Some(&refresh);
                assert!(whole, "kill {kill}: {provider}: two logins are mixed");
                let file = login::read(state, provider);
                assert_eq!(file["neighbour"], json!({"kept": true}), "kill {kill}");
                if up.honours(&refresh) {
                    match access == old {
                        true => early += 1,
                        false => saved += 1,
                    }
                    continue;
                }
                // The only loss there may be: the vendor has answered, and nobody has seen its answer yet.
                assert_eq!(
                    refresh, spent,
                    "kill {kill}: {provider}: lost after it was saved"
                );
                let answer = lock(&seen.spent)[&spent].clone();
                let lost =
                    lock(&seen.saved).contains(&answer) || lock(&seen.used).contains(&answer);
                assert!(!lost, "kill {kill}: {provider}: lost after it was saved");
                between += 1;
                log_in(provider);
            }
        }
        drop(watched);
        watcher.join().expect("no torn file")
    });
    assert_eq!(
        seen.unsaved.load(Ordering::SeqCst),
        0,
        "used before it was saved"
    );
    assert_eq!(up.reused(), 0);
    say(&format!(
        "{kills} kills within {window:?} of the start, two logins each: {early} before the vendor's answer, \
         {between} between it and the save, {saved} after the save; 0 other logins lost, 0 torn files in {reads} reads"
    ));

    // What the last kill left behind is cleared away by the next refresh.
    for provider in PROVIDERS {
        expire(state, provider);
    }
    let mut mux = with_state(&up, state).start();
    for (target, provider) in [(MESSAGES, "claude"), (RESPONSES, "chatgpt")] {
        assert_eq!(mux.ask("POST", target, &[], b"{}").status, 200);
        let path = login::path(state, provider);
        let names = fs::read_dir(path.parent().expect("a folder")).expect("read a folder");
        assert_eq!(names.count(), 1, "{provider}: nothing but the login");
        let mode = path.metadata().expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    assert_eq!(mux.stop(), 0);
}

/// The lock of a state folder keeps nobody from a login that another one has a link to as well.
#[test]
fn two_that_are_linked_to_one_login_do_not_spend_it_twice() {
    let up = Upstream::plain();
    let go = up.hold_refreshes();
    let setups = [Setup::new(&up), Setup::new(&up)];
    let [shared, link] = setups.each_ref().map(|s| s.state().join("claude"));
    fs::remove_dir_all(&link).expect("remove a folder");
    symlink(&shared, &link).expect("link a folder");
    let [first, second] = setups;
    let ended = up.login("claude", -10);
    let first = first.save("claude", &ended.claude()).start();
    up.wait(1, Request::is_refresh);
    let second = second.start();
    let answer = second.message();
    assert_eq!(answer.status, 503);
    assert!(
        answer.error().contains("another ai-mux is refreshing it"),
        "{}",
        answer.text()
    );
    go.advance();
    assert_eq!(first.message().status, 200);
    assert_eq!(second.message().status, 200, "the new login is adopted");
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    let names = fs::read_dir(&shared).expect("read a folder");
    assert_eq!(names.count(), 1, "nothing but the login");
}

fn wait_until_served(mux: &Mux) {
    wait_until("what was mended is noticed", || mux.message().status == 200);
}

/// Where nothing can be saved, nothing is spent; and when that is mended, all is well.
#[test]
fn a_full_and_a_read_only_disk_are_found_out_before_a_token_is_spent() {
    type Do = fn(&Disk);
    let cases: [(&str, Do, Do); 3] = [
        ("full", |d| d.fill(0), Disk::free),
        // A login could outgrow a page.
        ("almost full", |d| d.fill(1), Disk::free),
        ("read-only", |d| d.remount("ro"), |d| d.remount("rw")),
    ];
    at_once(cases, |(case, harm, mend)| {
        let folder = Folder::new();
        let Some(disk) = Disk::mount(folder.0.join("claude"), "tmpfs") else {
            return;
        };
        let up = Upstream::plain();
        let expired = file("claude", &up.login("claude", -10));
        login::save(&folder.0, "claude", &expired);
        harm(&disk);
        let mux = with_state(&up, &folder.0).start();
        mux.wait_log("next try");
        let before = mux.footprint();
        for _ in 0..5 {
            let answer = mux.message();
            assert_eq!(answer.status, 503, "{case}");
            answer.error();
        }
        assert_eq!(up.refreshes().len(), 0, "{case}");
        assert_eq!(login::read(&folder.0, "claude"), expired, "{case}");
        mend(&disk);
        wait_until_served(&mux);
        assert_eq!((up.refreshes().len(), up.reused()), (1, 0), "{case}");
        let [access, _] = tokens("claude", &login::read(&folder.0, "claude"));
        assert_eq!(up.requests()[0].bearer(), access, "{case}");
        mux.assert_recovered(before, 8);
    });
}

/// What the vendor answers then is used from memory, and saved as soon as there is room.
#[test]
fn a_disk_that_fills_while_the_vendor_answers() {
    let folder = Folder::new();
    let Some(disk) = Disk::mount(folder.0.join("claude"), "tmpfs") else {
        return;
    };
    let disk = Arc::new(disk);
    let up = Upstream::plain();
    let filled = disk.clone();
    up.on_refresh(move |_, _| {
        filled.fill(0);
        Ok(false)
    });
    login::save(
        &folder.0,
        "claude",
        &file("claude", &up.login("claude", -10)),
    );
    let mux = with_state(&up, &folder.0).start();
    assert_eq!(mux.message().status, 200);
    mux.wait_log("ERROR");
    disk.free();
    let used = up.requests()[0].bearer().to_owned();
    wait_until("it is saved", || {
        tokens("claude", &login::read(&folder.0, "claude"))[0] == used
    });
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// While the vendor answers, the folder is closed, for reading too: what is in memory is the only copy.
#[test]
fn a_login_that_can_neither_be_saved_nor_read_again_is_not_given_up() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).set("refresh_check_interval", "1s");
    let folder = setup.state().join("claude");
    let close = |mode| fs::Permissions::from_mode(mode);
    let closed = folder.clone();
    up.on_refresh(move |_, _| fs::set_permissions(&closed, close(0o000)).map(|()| false));
    let setup = setup.save("claude", &file("claude", &up.login("claude", -10)));
    let mux = setup.unprivileged().start();
    mux.wait_log("ERROR");
    fs::set_permissions(&folder, close(0o700)).expect("chmod");
    wait_until_served(&mux);
    let used = up.requests()[0].bearer().to_owned();
    wait_until("it is saved", || {
        tokens("claude", &login::read(&mux.state(), "claude"))[0] == used
    });
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// Another tool rewrites the file in place, again and again, in two parts.
#[test]
fn a_file_that_is_rewritten_while_it_is_read() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let logins = [up.login("claude", 3600), up.login("claude", 7200)];
    let setup = setup.save("claude", &file("claude", &logins[0]));
    let path = login::path(&setup.state(), "claude");
    let mux = setup.start();
    let before = mux.warm_footprint();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for login in logins.iter().cycle().take(1000) {
                let text = file("claude", login).to_string();
                let (first, second) = text.as_bytes().split_at(below(text.len() as u64) as usize);
                let mut file = fs::File::create(&path).expect("rewrite a file");
                file.write_all(first).expect("write a file");
                thread::yield_now();
                file.write_all(second).expect("write a file");
            }
            over.store(true, Ordering::SeqCst);
        });
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    assert_eq!(mux.message().status, 200);
                }
            });
        }
    });
    let known = |req: &Request| logins.iter().any(|login| login.access == req.bearer());
    assert!(up.requests().iter().all(known));
    assert_eq!(up.refreshes().len(), 0);
    assert_eq!(mux.message().status, 200);
    let last = up.requests().pop().expect("a request");
    assert_eq!(last.bearer(), logins[1].access);
    assert_eq!(
        login::read(&mux.state(), "claude"),
        file("claude", &logins[1])
    );
    mux.assert_recovered(before, 64);
}

/// A clock of its own, and what sets it.
fn with_clock(setup: Setup) -> Option<(Setup, impl Fn(&str))> {
    let clock = setup.write("clock", "+0");
    let setup = setup
        .env("LD_PRELOAD", setup::faketime()?)
        .env("FAKETIME_TIMESTAMP_FILE", &clock)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let jump = move |to: &str| {
        let new = format!("{clock}.new");
        fs::write(&new, to).expect("write a file");
        fs::rename(new, &clock).expect("set the clock");
    };
    Some((setup, jump))
}

#[test]
fn a_token_that_is_refused_after_a_minute_is_refreshed_again() {
    let up = Upstream::plain();
    let Some((setup, jump)) = with_clock(Setup::new(&up)) else {
        return say("SKIPPED: no faketime, or a static ai-mux, which cannot load it");
    };
    let mux = setup.start();
    let used = || {
        assert_eq!(mux.message().status, 200);
        up.requests().pop().expect("a request").bearer().to_owned()
    };
    up.revoke(&used());
    let second = used();
    up.revoke(&second);
    assert_eq!(mux.message().status, 401, "it is too young");
    jump("+65s");
    assert_ne!(used(), second);
    assert_eq!((up.refreshes().len(), up.reused()), (2, 0));
}

/// A laptop that slept: the token that was good for an hour has expired, all at once. And a clock that
/// is set back harms nothing.
#[test]
fn a_clock_that_jumps() {
    let up = Upstream::plain();
    let Some((setup, jump)) = with_clock(Setup::new(&up)) else {
        return say("SKIPPED: no faketime, or a static ai-mux, which cannot load it");
    };
    let mux = setup.start();
    let ask = || {
        assert_eq!(mux.message().status, 200);
        up.requests().pop().expect("a request").bearer().to_owned()
    };
    let first = ask();
    jump("-30d");
    assert_eq!(ask(), first);
    jump("+2h");
    let second = ask();
    assert_ne!(second, first, "it expired an hour ago");
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    jump("+0");
    assert_eq!(ask(), second);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    jump("+20h");
    let third = ask();
    assert_ne!(
        third, second,
        "asleep for longer than it lasts, right after a refresh"
    );
    assert_eq!((up.refreshes().len(), up.reused()), (2, 0));
    let [saved, _] = tokens("claude", &login::read(&mux.state(), "claude"));
    assert_eq!(saved, third);
}

/// However many refreshes have come since, and even while one is running: to spend it again would end the login.
#[test]
fn a_login_that_was_spent_long_ago_and_is_put_back() {
    let up = Upstream::plain();
    let old = up.login("claude", -10).claude();
    let Some((setup, jump)) = with_clock(Setup::new(&up).save("claude", &old)) else {
        return say("SKIPPED: no faketime, or a static ai-mux, which cannot load it");
    };
    let mux = setup.start();
    let put_back = || login::save(&mux.state(), "claude", &old);
    let is_saved = |access: &str| {
        wait_until("ours is in its place again", || {
            tokens("claude", &login::read(&mux.state(), "claude"))[0] == access
        })
    };
    for time in ["+0", "+20h", "+40h"] {
        jump(time);
        assert_eq!(mux.message().status, 200);
    }
    assert_eq!((up.refreshes().len(), up.reused()), (3, 0));
    let third = up.requests().pop().expect("a request").bearer().to_owned();
    put_back();
    assert_eq!(mux.message().status, 200);
    is_saved(&third);
    let go = up.hold_refreshes();
    jump("+60h");
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(4, Request::is_refresh);
    put_back();
    go.advance();
    assert_eq!(client.answer().status, 200);
    let fourth = up.requests().pop().expect("a request").bearer().to_owned();
    is_saved(&fourth);
    assert_eq!((up.refreshes().len(), up.reused()), (4, 0));
}
