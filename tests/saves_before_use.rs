//! A new token is on disk before anyone uses it, and a place where it could not be saved is found out
//! before the old one is spent.

mod common;
use common::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

fn allow(folder: &Path, mode: u32) {
    fs::set_permissions(folder, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// An upstream that answers whether the file, in the folder that is set, holds the token it is asked with.
fn tells_what_is_saved() -> (Upstream, Arc<OnceLock<PathBuf>>) {
    let state = Arc::new(OnceLock::<PathBuf>::new());
    let seen = state.clone();
    let up = Upstream::start(move |req, conn| {
        let path = login::path(seen.get().expect("a folder"), "claude");
        let file: Value = serde_json::from_str(&fs::read_to_string(path)?).unwrap_or_default(); // half written
        let saved = file["claudeAiOauth"]["accessToken"] == json!(req.bearer());
        conn.respond(200, &[], if saved { b"saved" } else { b"not saved" })
    });
    (up, state)
}

#[test]
fn the_file_holds_every_token_that_the_upstream_sees() {
    let (up, state) = tells_what_is_saved();
    let setup = Setup::new(&up);
    state.set(setup.state()).expect("set once");
    let mux = setup.start();
    for round in 1..=20 {
        login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
        let mut clients: Vec<_> = (0..4).map(|_| mux.client()).collect();
        for client in &mut clients {
            client.request("POST", MESSAGES, &[BEARER], b"{}");
        }
        for client in &mut clients {
            assert_eq!(client.answer().text(), "saved");
        }
        assert_eq!((up.refreshes().len(), up.reused()), (round, 0));
    }
}

#[test]
fn an_unwritable_folder_is_found_out_before_the_refresh_token_is_spent() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let folder = setup.state().join("claude");
    let setup = setup.unprivileged();
    allow(&folder, 0o500);
    let mux = setup.start();
    mux.wait_log("next try");
    let answer = mux.message();
    assert_eq!(answer.status, 503);
    answer.error();
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    assert_eq!(up.refreshes().len(), 0);
    allow(&folder, 0o700);
    wait_until("it is served", || mux.message().status == 200);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// The folder closes while the vendor answers. The tokens live on in memory until they can be saved.
fn unsaved(up: &Upstream, setup: Setup) -> Mux {
    unsaved_by("claude", up, setup)
}

fn unsaved_by(provider: &str, up: &Upstream, setup: Setup) -> Mux {
    let folder = setup.state().join(provider);
    up.on_refresh(move |_, _| {
        allow(&folder, 0o500);
        Ok(false)
    });
    let setup = setup.save(provider, &up.login(provider, -10).file(provider));
    let mux = setup.unprivileged().start();
    mux.wait_log("ERROR");
    let answer = mux.ask("POST", target(provider), &[], b"{}");
    assert_eq!(answer.status, 200, "the tokens in memory serve");
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    mux
}

/// The vendor's answer does not name it.
#[test]
fn the_account_lives_on_in_memory_as_well() {
    let up = Upstream::plain();
    let mux = unsaved_by("chatgpt", &up, Setup::new(&up));
    let request = up.requests().pop().expect("a request");
    let file = login::read(&mux.state(), "chatgpt");
    let account = file["tokens"]["account_id"].as_str();
    assert_ne!(file["tokens"]["access_token"], json!(request.bearer()));
    assert!(account.is_some() && request.head.get("chatgpt-account-id") == account);
    allow(&mux.state().join("chatgpt"), 0o700);
}

/// The same when the file itself is another user's for a moment.
#[test]
fn a_login_is_not_given_up_for_a_file_that_was_given_away() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let path = login::path(&setup.state(), "claude");
    if chown(&path, Some(0), None).is_err() {
        return say("SKIPPED: only root gives a file away");
    }
    let given = path.clone();
    up.on_refresh(move |_, _| chown(&given, Some(0), None).map(|()| false));
    let mux = setup.unprivileged().start();
    mux.wait_log("ERROR");
    assert_eq!(mux.message().status, 200, "the tokens in memory serve");
    chown(&path, Some(setup::NOBODY), None).expect("give a file away");
    wait_until_saved(&up, &mux);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// Nor for one that was given away before, and again.
#[test]
fn a_login_is_not_given_up_for_a_file_that_was_given_away_twice() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let path = login::path(&setup.state(), "claude");
    if chown(&path, Some(0), None).is_err() {
        return say("SKIPPED: only root gives a file away");
    }
    let go = up.hold_refreshes();
    let mux = setup.unprivileged().start();
    up.wait(1, Request::is_refresh);
    chown(&path, Some(0), None).expect("give a file away");
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health.json()["providers"]["claude"], "unavailable");
    chown(&path, Some(1), None).expect("give a file away");
    go.advance();
    mux.wait_log("ERROR");
    for _ in 0..20 {
        assert_eq!(mux.message().status, 200, "the tokens in memory serve");
    }
    let told = mux.log_lines("not ai-mux's").len();
    assert!(told < 10, "told {told} times");
    chown(&path, Some(setup::NOBODY), None).expect("give a file away");
    wait_until_saved(&up, &mux);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

fn wait_until_saved(up: &Upstream, mux: &Mux) {
    let used = up.requests().pop().expect("a request").bearer().to_owned();
    wait_until("it is saved", || {
        login::read(&mux.state(), "claude")["claudeAiOauth"]["accessToken"] == json!(used)
    });
}

#[test]
fn what_could_not_be_written_is_written_at_the_next_look() {
    let up = Upstream::plain();
    let mux = unsaved(&up, Setup::new(&up).set("refresh_check_interval", "1s"));
    // By the wait alone, which doubles from 5 s on, the fifth try would come after 75 s.
    mux.wait_log_times("in memory only", 5);
    allow(&mux.state().join("claude"), 0o700);
    wait_until_saved(&up, &mux);
}

/// Not only then, when that is minutes away: until it is on disk, a crash would lose the login.
#[test]
fn what_could_not_be_written_is_tried_again_soon() {
    let up = Upstream::plain();
    let mux = unsaved(&up, Setup::new(&up).set("refresh_check_interval", "30m"));
    allow(&mux.state().join("claude"), 0o700);
    wait_until_saved(&up, &mux);
}

#[test]
fn what_could_not_be_written_is_written_at_shutdown() {
    let up = Upstream::plain();
    let mut mux = unsaved(&up, Setup::new(&up));
    allow(&mux.state().join("claude"), 0o700);
    assert_eq!(mux.stop(), 0);
    wait_until_saved(&up, &mux);
}

/// Whoever made the refresh: the keeper, who looks after it then, waits as the log says.
#[test]
fn what_a_request_could_not_write_is_tried_again_after_the_wait() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).unprivileged().start();
    assert_eq!(mux.message().status, 200);
    let folder = mux.state().join("claude");
    up.on_refresh(move |_, _| {
        allow(&folder, 0o500);
        Ok(false)
    });
    up.revoke(up.requests().pop().expect("a request").bearer());
    let begun = Instant::now();
    assert_eq!(mux.message().status, 200);
    for (tries, least) in [(2, 5), (3, 15)] {
        mux.wait_log_times("in memory only", tries);
        let time = begun.elapsed();
        assert!(time >= Duration::from_secs(least), "{tries} in {time:?}");
    }
}

/// Requests, which may be many, do not drive the tries: each one makes the next wait longer.
#[test]
fn requests_do_not_wear_out_the_tries() {
    let up = Upstream::plain();
    let mux = unsaved(&up, Setup::new(&up).set("refresh_check_interval", "30m"));
    let used = up.requests().pop().expect("a request").bearer().to_owned();
    up.revoke(&used);
    for _ in 0..4 {
        assert_eq!(mux.message().status, 401);
    }
    let tries = mux.log_lines("in memory only").len();
    assert!(tries <= 2, "{tries} tries");
}

/// Nor do they take the time of a try without one, where the new login is due for a refresh itself.
#[test]
fn requests_do_not_stand_in_for_a_try() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let (folder, vendor) = (setup.state().join("claude"), up.shared.clone());
    let closed = folder.clone();
    up.on_refresh(move |request, conn| {
        allow(&closed, 0o500);
        let answer = vendor.vendors.renew(request, 60).expect("a new login");
        conn.json(200, &answer).map(|()| true)
    });
    let mux = setup.unprivileged().start();
    mux.wait_log("ERROR");
    allow(&folder, 0o700);
    let saved = || mux.log().contains("claude: refreshed");
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut client = mux.client();
                while !saved() {
                    client.request("POST", MESSAGES, &[BEARER], b"{}");
                    assert_eq!(client.answer().status, 200);
                }
            });
        }
    });
    let log = mux.log();
    let tries = log.matches("next try in").count();
    assert_eq!(tries, 1, "the first time, it could be saved:\n{log}");
}

#[test]
fn what_is_written_late_is_still_young() {
    let up = Upstream::plain();
    let mux = unsaved(&up, Setup::new(&up).set("refresh_check_interval", "1s"));
    let used = up.requests().pop().expect("a request").bearer().to_owned();
    allow(&mux.state().join("claude"), 0o700);
    wait_until_saved(&up, &mux);
    up.revoke(&used);
    assert_eq!(mux.message().status, 401);
    assert_eq!(up.refreshes().len(), 1);
}

/// A folder that goes away is a log-out; but what comes back with it is the login that was spent.
#[test]
fn what_could_not_be_written_outlives_a_folder_that_goes_away_for_a_moment() {
    let up = Upstream::plain();
    let mux = unsaved(&up, Setup::new(&up).set("refresh_check_interval", "1s"));
    let (folder, away) = (mux.state().join("claude"), mux.state().join("away"));
    fs::rename(&folder, &away).expect("move the folder");
    wait_until("it is logged out", || mux.message().status == 503);
    allow(&away, 0o700);
    fs::rename(&away, &folder).expect("move it back");
    wait_until("it is served", || mux.message().status == 200);
    wait_until_saved(&up, &mux);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// As another tool does that is about to write the file anew: until it has, nothing of ours goes upstream.
#[test]
fn a_file_that_is_just_being_written_is_waited_for() {
    assert!((0..10).any(|_| is_waited_for()), "the machine is too slow");
}

/// `false`: the machine paused, and the other tool was slower than a real one, so nothing was shown.
fn is_waited_for() -> bool {
    let (up, state) = tells_what_is_saved();
    let (told, took) = mpsc::channel();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    state.set(setup.state()).expect("set once");
    let path = login::path(&setup.state(), "claude");
    up.on_refresh(move |_, _| {
        let begun = Instant::now(); // before ai-mux has its answer
        let whole = fs::read(&path)?;
        fs::write(&path, &whole[..whole.len() / 2])?;
        let (path, told) = (path.clone(), told.clone());
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            let written = fs::write(path, whole);
            told.send(begun.elapsed()).expect("a test that waits");
            written
        });
        Ok(false)
    });
    let mux = setup.start();
    let answer = mux.message();
    let time = took.recv_timeout(PATIENCE).expect("a whole file");
    if time > Duration::from_millis(200) {
        return false; // of the 250 that ai-mux waits
    }
    assert_eq!(answer.text(), "saved");
    assert!(mux.log_lines("ERROR").is_empty(), "{}", mux.log());
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    true
}

/// As another tool does that begins to write the file anew just when ours is in place.
#[test]
fn a_file_that_is_emptied_behind_ours_costs_no_second_refresh() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("refresh_check_interval", "30m").start();
    mux.message();
    let ended = up.login("claude", -10);
    login::save(&mux.state(), "claude", &ended.claude());
    let path = login::path(&mux.state(), "claude");
    let inode = |path: &Path| fs::metadata(path).map(|file| file.ino()).ok();
    let (watched, old) = (path.clone(), inode(&path));
    let other = thread::spawn(move || {
        let begun = Instant::now();
        while inode(&watched) == old && begun.elapsed() < PATIENCE {}
        fs::write(&watched, b"").expect("empty the file");
    });
    assert_eq!(mux.message().status, 200);
    other.join().expect("the other tool");
    let used = up.requests().pop().expect("a request");
    assert_ne!(used.bearer(), ended.access);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

#[test]
fn nothing_is_spent_while_the_file_is_broken() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("refresh_check_interval", "1s").start();
    let old = up.login("claude", 75); // due in 14 s, with its file broken before
    login::save(&mux.state(), "claude", &old.claude());
    assert_eq!(mux.message().status, 200);
    let broken = fs::write(login::path(&mux.state(), "claude"), b"{\"claudeAiOauth\":");
    broken.expect("break the file");
    mux.wait_log("next try");
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.refreshes().len(), 0);
    assert!(up.honours(&old.refresh));
}

/// Renaming over it would fail, and no new login could be saved: the folder is to be mounted.
#[test]
fn a_file_that_is_mounted_by_itself_is_found_out_before_a_token_is_spent() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let path = login::path(&setup.state(), "claude").display().to_string();
    let mounted = setup.write("mounted", fs::read(&path).expect("a file"));
    fs::write(format!("{path}.ai-mux-try"), b"").expect("what kill -9 left behind");
    let Some(script) = setup::mounting(&mounted, &path) else {
        return say("SKIPPED: only root mounts");
    };
    let mux = setup.shell(&script).start();
    mux.wait_log("next try");
    let answer = mux.message();
    assert_eq!(answer.status, 503);
    let message = answer.error();
    assert!(message.contains("mount its folder"), "{message}");
    assert_eq!(up.refreshes().len(), 0);
}

/// Or a crash of the machine could leave neither the old login nor the new one.
#[test]
fn it_is_synced_before_it_is_in_place_and_its_folder_after() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let calls = setup.folder.0.join("calls");
    let options = format!("-y -o {} -e trace=fsync,/rename", calls.display());
    let Some(script) = setup::under_strace(&options) else {
        return say("SKIPPED: no strace");
    };
    let mut mux = setup.shell(&script).start();
    mux.wait_log("claude: refreshed");
    assert_eq!(mux.stop(), 0);
    let calls = fs::read_to_string(calls).expect("what strace wrote");
    let names = calls.lines().filter_map(|line| line.split_once('('));
    let names = names.filter_map(|(front, _)| front.split(' ').next_back());
    let names = names.filter(|name| *name != "???"); // where strace lost sight of a thread
    let names: Vec<_> = names
        .map(|name| name.split("at").next().unwrap_or(name))
        .collect();
    // The first is of the rehearsal, before a token is spent.
    assert_eq!(names, ["fsync", "fsync", "rename", "fsync"], "{calls}");
    let synced = calls.lines().filter(|line| line.contains("fsync("));
    let ends = ["ai-mux-try>)", "ai-mux-new>)", "/claude>)"];
    for (line, end) in synced.zip(ends) {
        assert!(line.contains(end), "{end}: {calls}");
    }
}

/// The rehearsal takes a while on a slow disk, and what another tool does meanwhile counts.
#[test]
fn a_token_that_was_replaced_just_before_is_not_spent() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let options = "-o /dev/null -e trace=fsync -e inject=fsync:delay_enter=2000000";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: no strace");
    };
    let path = login::path(&setup.state(), "claude");
    let folder = path.parent().expect("a folder").to_owned();
    let mut mux = setup.shell(&script).start();
    let drafted = || fs::read_dir(&folder).expect("a folder").count() > 1;
    let begun = Instant::now();
    while !drafted() && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(1));
    }
    let newer = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &newer.claude());
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[0].bearer(), newer.access);
    assert_eq!(mux.stop(), 0); // which waits for the refresh that has begun
    assert_eq!(up.refreshes().len(), 0);
}

/// Another tool's login that comes just when the file is to be replaced is not overwritten.
#[test]
fn a_login_that_comes_in_the_moment_of_saving_stays() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let options = "-o /dev/null -e trace=fsync -e inject=fsync:delay_enter=2000000:when=2";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: no strace");
    };
    let path = login::path(&setup.state(), "claude");
    let folder = path.parent().expect("a folder").to_owned();
    let mut mux = setup.shell(&script).start();
    up.wait(1, Request::is_refresh);
    wait_until("it is written", || {
        fs::read_dir(&folder).expect("a folder").count() > 1
    });
    let newer = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &newer.claude());
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[0].bearer(), newer.access);
    assert_eq!(mux.stop(), 0); // which waits for the saving
    assert_eq!(login::read(&mux.state(), "claude"), newer.claude());
}

/// A change of the file's mode, say, just when it is to be replaced: the next try is at once.
#[test]
fn a_touch_in_the_moment_of_saving_delays_nothing() {
    let (up, state) = tells_what_is_saved();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    state.set(setup.state()).expect("set once");
    // The second is between the reading of the file and the last look at it.
    let options = "-o /dev/null -e trace=fsync -e inject=fsync:delay_enter=2000000:when=2";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: no strace");
    };
    let path = login::path(&setup.state(), "claude");
    let mux = setup.shell(&script).start();
    up.wait(1, Request::is_refresh);
    let folder = path.parent().expect("a folder");
    wait_until("it is written", || {
        fs::read_dir(folder).expect("a folder").count() > 1
    });
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("chmod");
    assert_eq!(mux.message().text(), "saved");
    assert!(mux.log_lines("ERROR").is_empty(), "{}", mux.log());
}

/// In the log: each time that it could not be saved, and at a stop, that it is lost.
#[test]
fn what_keeps_it_from_being_saved_is_told() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let (folder, vendor) = (setup.state().join("claude"), up.shared.clone());
    up.on_refresh(move |request, conn| {
        allow(&folder, 0o500);
        let answer = vendor.vendors.renew(request, 60).expect("a new login");
        conn.json(200, &answer).map(|()| true)
    });
    let mut mux = setup.unprivileged().start();
    mux.wait_log("ERROR");
    for line in mux.log_lines("ERROR") {
        assert!(line.contains("ermission denied"), "{line}");
        assert!(line.contains("in memory only"), "{line}");
    }
    assert_eq!(mux.stop(), 0);
    let log = mux.log();
    let lost = log.lines().rev().find(|line| line.contains("ERROR"));
    assert!(lost.is_some_and(|line| line.contains("lost")), "{log}");
    assert!(log.trim_end().ends_with("stopped"), "{log}");
}

/// Where a folder cannot be opened to be synced, what is in place counts as saved; also where it cannot be told by
/// a new refresh token that it is.
#[test]
fn what_is_in_place_is_saved_even_if_its_folder_cannot_be_synced() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let (folder, fresh) = (setup.state().join("claude"), up.login("claude", 3600));
    let answer = json!({"access_token": fresh.access, "expires_in": 3600});
    up.on_refresh(move |_, conn| conn.json(200, &answer).map(|()| true));
    let setup = setup.unprivileged();
    allow(&folder, 0o300);
    let mux = setup.start();
    assert_eq!(mux.message().status, 200);
    wait_until_saved(&up, &mux);
    allow(&folder, 0o700);
    mux.wait_log("claude: refreshed");
    assert!(mux.log_lines("ERROR").is_empty(), "{}", mux.log());
}

#[test]
fn the_folder_that_must_be_writable_is_the_one_behind_a_linked_file() {
    let up = Upstream::plain();
    let setup = Setup::bare(&up).save("claude", &up.login("claude", -10).claude());
    let (path, folder) = (
        login::path(&setup.state(), "claude"),
        setup.state().join("behind"),
    );
    fs::create_dir(&folder).expect("make a folder");
    fs::rename(&path, folder.join("file")).expect("move the file");
    std::os::unix::fs::symlink(folder.join("file"), &path).expect("link to it");
    let setup = setup.unprivileged();
    allow(&folder, 0o500);
    let mux = setup.start();
    mux.wait_log("next try");
    let message = mux.message().error();
    assert!(
        message.contains(&format!("'{}' must be writable", folder.display())),
        "{message}"
    );
    allow(&folder, 0o700);
}
