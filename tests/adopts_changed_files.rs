//! A credential file that another hand changes is noticed at the next request, and never overwritten.

mod common;
use common::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

fn file(mux: &Mux) -> PathBuf {
    login::path(&mux.state(), "claude")
}

/// The access token that the next request is sent with.
fn used(up: &Upstream, mux: &Mux) -> String {
    assert_eq!(mux.message().status, 200);
    up.requests().pop().expect("a request").bearer().to_owned()
}

fn assert_down(mux: &Mux, case: &str) -> String {
    let answer = mux.message();
    assert_eq!(answer.status, 503, "{case}");
    let message = answer.error();
    let remedy = login::remedy(&mux.state(), "claude");
    assert!(message.contains(&remedy), "{case}: {message}");
    assert_eq!(
        mux.ask("POST", RESPONSES, &[], b"{}").status,
        200,
        "{case}: the other serves"
    );
    message
}

#[test]
fn replaced_whole_or_rewritten_in_place() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    for _ in 0..10 {
        let (moved, rewritten) = (up.login("claude", 3600), up.login("claude", 3600));
        login::save(&mux.state(), "claude", &moved.claude());
        assert_eq!(used(&up, &mux), moved.access);
        fs::write(file(&mux), rewritten.claude().to_string()).expect("rewrite a file");
        assert_eq!(used(&up, &mux), rewritten.access);
    }
    assert_eq!(up.refreshes().len(), 0);
}

/// Until it lay still for so long that, once looked at, it is not read again.
fn wait_until_still(path: &Path) {
    let changed = fs::metadata(path).expect("a file").ctime() as u64;
    wait_until("it lies still", || login::now() > changed + 3);
}

/// One that lay still for a while is not read at each request; when it looks different, it is.
#[test]
fn replaced_after_it_lay_still_for_a_while() {
    const SIZE: usize = 256 << 10;
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let path = file(&mux);
    wait_until_still(&path);
    used(&up, &mux);
    for in_place in [false, true] {
        let new = up.login("claude", 3600);
        let mut json = new.claude();
        json["other"] = "x".repeat(SIZE).into();
        match in_place {
            false => login::save(&mux.state(), "claude", &json),
            true => fs::write(&path, json.to_string()).expect("rewrite a file"),
        }
        assert_eq!(used(&up, &mux), new.access, "in place: {in_place}");
        wait_until_still(&path);
        used(&up, &mux); // now it need not be read again
        let before = mux.bytes_read();
        used(&up, &mux);
        assert_eq!(mux.ask("GET", "/healthz", &[], b"").status, 200);
        let read = mux.bytes_read() - before;
        assert!(read < SIZE, "{read} bytes for a request and a look");
    }
}

/// With Claude's login on a ramfs, if there can be one: it knows times by the tick of some milliseconds only, as ext4
/// did before Linux 6.13.
fn on_coarse_times(up: &Upstream) -> (Mux, Option<Disk>) {
    let setup = Setup::bare(up);
    let disk = Disk::mount(setup.state().join("claude"), "ramfs");
    let setup = setup.save("claude", &up.login("claude", 3600).claude());
    (setup.start(), disk)
}

/// The same inode, the same size, and often the same tick of the clock that stamps files.
#[test]
fn rewritten_in_place_again_and_again() {
    let up = Upstream::start(|req, conn| conn.respond(200, &[], req.bearer().as_bytes()));
    let (mux, _disk) = on_coarse_times(&up);
    let logins: Vec<_> = (0..100).map(|_| up.login("claude", 3600)).collect();
    let texts: Vec<_> = logins
        .iter()
        .map(|login| login.claude().to_string())
        .collect();
    let (mut client, path) = (mux.client(), file(&mux));
    for (login, text) in logins.iter().zip(&texts) {
        fs::write(&path, text).expect("rewrite a file");
        let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
        assert_eq!(answer.text(), login.access);
    }
}

#[test]
fn a_form_may_change_too() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    for _ in 0..2 {
        for form in [Login::flat, Login::codex] {
            let login = up.login("chatgpt", 3600);
            login::save(&mux.state(), "chatgpt", &form(&login));
            assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
            let request = up.requests().pop().expect("a request");
            assert_eq!(request.bearer(), login.access);
            assert_eq!(
                request.head.get("chatgpt-account-id"),
                Some(login.account.as_str())
            );
        }
    }
}

#[test]
fn half_written_the_old_token_serves_until_the_file_is_whole() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let old = used(&up, &mux);
    let new = up.login("claude", 3600);
    let text = new.claude().to_string();
    for half in [
        "",
        "{",
        &text[..text.len() / 2],
        &text[..text.len() - 1],
        "\0\0\0\0",
    ] {
        fs::write(file(&mux), half).expect("write half a file");
        assert_eq!(used(&up, &mux), old, "{half:?}");
    }
    fs::write(file(&mux), text).expect("write a file");
    assert_eq!(used(&up, &mux), new.access);
}

#[test]
fn missing_at_start_it_is_picked_up_when_it_appears() {
    let up = Upstream::plain();
    let (claude, chatgpt) = (up.login("claude", 3600), up.login("chatgpt", 3600));
    let mux = Setup::bare(&up).save("chatgpt", &chatgpt.flat()).start();
    assert_down(&mux, "missing");
    login::save(&mux.state(), "claude", &claude.claude());
    assert_eq!(used(&up, &mux), claude.access);
}

#[test]
fn malformed_at_start_it_is_picked_up_when_it_is_mended() {
    let up = Upstream::plain();
    for broken in [
        "",
        "not json",
        "{\"claudeAiOauth\":",
        "[]",
        "{\"claudeAiOauth\":{\"accessToken\":5}}",
    ] {
        let setup = Setup::new(&up);
        fs::write(login::path(&setup.state(), "claude"), broken).expect("write a file");
        let mux = setup.start();
        assert_down(&mux, broken);
        let mended = up.login("claude", 3600);
        login::save(&mux.state(), "claude", &mended.claude());
        assert_eq!(used(&up, &mux), mended.access, "{broken}");
    }
}

/// Nobody waits for one that has no end, or none yet.
#[test]
fn what_is_no_file_is_no_login() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let path = login::path(&setup.state(), "claude");
    fs::remove_file(&path).expect("remove a file");
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.expect("run mkfifo").success());
    let mux = setup.start();
    assert_down(&mux, "a pipe");
    let large = format!(
        "{}{}",
        " ".repeat(1 << 20),
        up.login("claude", 3600).claude()
    );
    fs::remove_file(&path).expect("remove a pipe");
    fs::write(&path, large).expect("write a file");
    assert_down(&mux, "too large");
}

#[test]
fn a_log_out_is_obeyed_and_never_undone() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("refresh_check_interval", "1s").start();
    assert_eq!(mux.message().status, 200);
    fs::remove_file(file(&mux)).expect("remove a file");
    assert_down(&mux, "gone");
    for empty in [
        json!({}),
        json!({"claudeAiOauth": null}),
        json!({"mcpOAuth": {}}),
    ] {
        login::save(&mux.state(), "claude", &empty);
        assert_down(&mux, &empty.to_string());
        assert_eq!(login::read(&mux.state(), "claude"), empty);
    }
    // Nor by a look in the background, of which there is one each second.
    let some_looks = || std::thread::sleep(Duration::from_millis(2500));
    some_looks();
    assert_eq!(login::read(&mux.state(), "claude"), json!({"mcpOAuth": {}}));
    fs::remove_file(file(&mux)).expect("remove a file");
    assert_down(&mux, "gone again");
    some_looks();
    assert!(!file(&mux).exists());
    let back = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &back.claude());
    assert_eq!(used(&up, &mux), back.access);

    for empty in [
        json!({"OPENAI_API_KEY": "x", "tokens": null}),
        json!({"OPENAI_API_KEY": null}),
    ] {
        login::save(&mux.state(), "chatgpt", &empty);
        assert_eq!(
            mux.ask("POST", RESPONSES, &[], b"{}").status,
            503,
            "{empty}"
        );
    }
}

#[test]
fn without_a_refresh_token_it_serves_until_it_expires() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let without = |login: &Login| {
        let mut file = login.claude();
        file["claudeAiOauth"]
            .as_object_mut()
            .expect("an object")
            .remove("refreshToken");
        file
    };
    let good = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &without(&good));
    assert_eq!(used(&up, &mux), good.access);
    let health = || mux.ask("GET", "/healthz", &[], b"").json();
    assert_eq!(health()["providers"]["claude"], "ready");
    login::save(&mux.state(), "claude", &without(&up.login("claude", -10)));
    // Asked first, it looks at the file itself.
    assert_eq!(health()["providers"]["claude"], "unavailable");
    assert_down(&mux, "expired");
    assert_eq!(up.refreshes().len(), 0);
}

/// The owner forces a refresh, or keeps one away.
#[test]
fn an_expiry_edited_by_hand_counts() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut login = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &login.claude());
    assert_eq!(used(&up, &mux), login.access);
    login.expires = now() - 10;
    login::save(&mux.state(), "claude", &login.claude());
    assert_ne!(used(&up, &mux), login.access);
    assert_eq!(up.refreshes().len(), 1);
}

/// While the vendor takes its time, another tool logs in anew: what it wrote stays.
#[test]
fn a_file_that_changes_during_a_refresh_wins() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let (state, winner) = (setup.state(), up.login("claude", 3600));
    let theirs = winner.claude();
    let text = theirs.to_string();
    up.on_refresh(move |_, _| {
        login::save(&state, "claude", &theirs);
        Ok(false)
    });
    let mux = setup.start();
    // Whoever asks refreshes it, and is answered only when it was, or was not, saved.
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    assert_eq!(used(&up, &mux), winner.access);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    assert_eq!(login::read(&mux.state(), "claude").to_string(), text);
}

/// As another tool does that had read the file before, or whoever plays an older file back: the login would be lost.
#[test]
fn a_login_that_was_spent_and_is_put_back_is_no_news() {
    let up = Upstream::plain();
    let old = up.login("claude", -10);
    let mux = Setup::new(&up).save("claude", &old.claude()).start();
    let ours = used(&up, &mux);
    let mut theirs = old.claude();
    theirs["added"] = json!("by another tool");
    for _ in 0..2 {
        login::save(&mux.state(), "claude", &theirs);
        assert_eq!(used(&up, &mux), ours);
        wait_until("ours is in its place again", || {
            login::read(&mux.state(), "claude")["claudeAiOauth"]["accessToken"] == json!(ours)
        });
        let file = login::read(&mux.state(), "claude");
        assert_eq!(file["added"], theirs["added"]);
    }
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    assert_eq!(mux.log_lines("that was spent").len(), 2);
}

/// Nor at the end, when nobody has looked at it since.
#[test]
fn a_login_that_was_spent_and_is_put_back_is_replaced_at_a_stop() {
    let up = Upstream::plain();
    let old = up.login("claude", -10);
    let mut mux = Setup::new(&up).save("claude", &old.claude()).start();
    let ours = used(&up, &mux);
    login::save(&mux.state(), "claude", &old.claude());
    assert_eq!(mux.stop(), 0);
    let file = login::read(&mux.state(), "claude");
    assert_eq!(file["claudeAiOauth"]["accessToken"], json!(ours));
    assert!(mux.log_lines("is lost").is_empty(), "{}", mux.log());
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// Only what was spent for the login in use: another account's is whose file it is in, even if it is of no use.
#[test]
fn a_spent_login_of_another_account_is_not_written_over() {
    let up = Upstream::plain();
    let [first, second] = [up.login("claude", -10), up.login("claude", -10)];
    let mux = Setup::new(&up).save("claude", &first.claude()).start();
    used(&up, &mux);
    login::save(&mux.state(), "claude", &second.claude());
    used(&up, &mux);
    assert_eq!((up.refreshes().len(), up.reused()), (2, 0));
    login::save(&mux.state(), "claude", &first.claude());
    assert_down(&mux, "invalid_grant");
    assert_eq!(login::read(&mux.state(), "claude"), first.claude());
}

/// What wins is a login like any other: if it has expired, it is refreshed in its turn.
#[test]
fn an_expired_file_that_wins_is_refreshed() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let (state, winner) = (mux.state(), up.login("claude", -10));
    let (theirs, spent) = (winner.claude(), winner.refresh.clone());
    up.on_refresh(move |req, _| {
        let second = String::from_utf8_lossy(&req.body).contains(&spent);
        if !second {
            login::save(&state, "claude", &theirs);
        }
        Ok(false)
    });
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    assert_ne!(used(&up, &mux), winner.access);
    assert_eq!((up.refreshes().len(), up.reused()), (2, 0));
}

#[test]
fn a_log_out_during_a_refresh_wins() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let path = login::path(&setup.state(), "claude");
    up.on_refresh(move |_, _| fs::remove_file(&path).map(|()| false));
    let mux = setup.start();
    // Whoever asks refreshes it, and is answered only when it was, or was not, saved.
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    assert_down(&mux, "logged out");
    assert!(!file(&mux).exists());
    assert_eq!(up.refreshes().len(), 1);
}

/// The same when somebody looks at the file in between: what the refresh brings is not put in its place.
#[test]
fn a_log_out_that_is_seen_during_a_refresh_wins() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    assert_eq!(mux.message().status, 200);
    let go = up.hold_refreshes();
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, Request::is_refresh);
    fs::remove_file(file(&mux)).expect("remove a file");
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health.json()["providers"]["claude"], "unavailable");
    go.advance();
    assert_eq!(client.answer().status, 503);
    assert_down(&mux, "logged out");
    assert!(!file(&mux).exists());
    assert!(mux.log_lines("in memory only").is_empty(), "unsaved");
}

#[test]
fn a_file_of_another_user_is_refused_with_the_remedy() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let path = login::path(&setup.state(), "claude");
    let other = rustix::process::geteuid().as_raw() + 1;
    if chown(&path, Some(other), None).is_err() {
        return say("SKIPPED: only root gives a file away");
    }
    let mux = setup.start();
    let message = assert_down(&mux, "another user's");
    assert!(message.contains("chown"), "{message}");
    let own = up.login("claude", 3600);
    fs::remove_file(file(&mux)).expect("remove a file");
    login::save(&mux.state(), "claude", &own.claude());
    assert_eq!(used(&up, &mux), own.access);
}

/// What the message says to do does help. systemd may show a dynamic user (61184 to 65519) its folder under another
/// owner than the disk's, whom only the folder itself can tell.
#[test]
fn the_remedy_for_a_file_of_another_user_mends_it() {
    for (user, by_reference) in [(setup::NOBODY, false), (61_500, true)] {
        let up = Upstream::plain();
        let mux = Setup::new(&up).run_as(user).start();
        if chown(file(&mux), Some(0), Some(0)).is_err() {
            return say("SKIPPED: only root gives a file away, and takes it back");
        }
        let message = assert_down(&mux, "another user's");
        let (_, remedy) = message.split_once(", or: ").expect("a command");
        let reference = format!("--reference='{}'", mux.state().display());
        assert_eq!(remedy.contains(&reference), by_reference, "{message}");
        let mended = Command::new("sh").args(["-c", remedy]).status();
        assert!(mended.expect("run sh").success(), "{remedy}");
        assert_eq!(mux.message().status, 200, "{remedy}");
    }
}

#[test]
fn a_folder_that_is_closed_to_it_is_told_with_the_remedy() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).unprivileged();
    let folder = setup.state().join("claude");
    let allow = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode));
    allow(0o000).expect("chmod");
    let mux = setup.start();
    let message = assert_down(&mux, "closed");
    assert!(message.contains("chown"), "{message}");
    allow(0o700).expect("chmod");
    assert_eq!(mux.message().status, 200);
}

/// As a tool does that keeps the times of what it copies: only the time of the change itself tells.
#[test]
fn rewritten_with_its_old_size_and_time() {
    let up = Upstream::plain();
    let (mux, _disk) = on_coarse_times(&up);
    let still = SystemTime::now() - Duration::from_secs(60);
    for _ in 0..20 {
        let new = up.login("claude", 3600);
        fs::write(file(&mux), new.claude().to_string()).expect("rewrite a file");
        let written = fs::File::options().write(true).open(file(&mux));
        written
            .and_then(|file| file.set_modified(still))
            .expect("set a time");
        assert_eq!(used(&up, &mux), new.access);
    }
}

/// One that was readable and is so no more is no login either; and is one again.
#[test]
fn one_that_cannot_be_read_any_more() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).unprivileged().start();
    let login = used(&up, &mux);
    let allow = |mode| fs::set_permissions(file(&mux), fs::Permissions::from_mode(mode));
    allow(0o000).expect("chmod");
    assert_down(&mux, "unreadable");
    assert_down(&mux, "unreadable");
    mux.wait_log("WARN");
    assert_eq!(mux.log_lines("WARN").len(), 1, "{}", mux.log());
    allow(0o600).expect("chmod");
    assert_eq!(used(&up, &mux), login);
}

/// The very file that was there before, which nothing has touched: a link that leads to it again.
#[test]
fn gone_and_back_again() {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let [link, there, empty] = ["state/claude", "there", "empty"].map(|n| setup.folder.0.join(n));
    fs::rename(&link, &there).expect("move a folder");
    symlink(&there, &link).expect("link a folder");
    fs::create_dir(&empty).expect("make a folder");
    fs::write(empty.join(".credentials.json"), "{}").expect("write a file");
    for folder in [&there, &empty] {
        wait_until_still(&folder.join(".credentials.json"));
    }
    let lead_to = |folder| {
        fs::remove_file(&link).expect("remove a link");
        symlink(folder, &link).expect("link a folder");
    };
    let mux = setup.start();
    let login = used(&up, &mux);
    lead_to(&empty);
    let down = mux.message();
    assert_eq!(down.status, 503, "{}", down.text());
    lead_to(&there);
    assert_eq!(used(&up, &mux), login);
}

/// It is the other tool's, not one that a refresh has just brought.
#[test]
fn replaced_during_a_refresh_and_refused_it_is_refreshed() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    used(&up, &mux);
    let go = up.hold_refreshes();
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, Request::is_refresh);
    let theirs = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &theirs.claude());
    assert_eq!(used(&up, &mux), theirs.access, "it is seen meanwhile");
    go.advance();
    assert_eq!(client.answer().status, 200);
    up.revoke(&theirs.access);
    assert_ne!(used(&up, &mux), theirs.access);
    assert_eq!((up.refreshes().len(), up.reused()), (2, 0));
}

/// A large body may take minutes to come, and goes up with the login that holds by then.
#[test]
fn replaced_while_a_request_comes_it_is_used_for_that() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    let expect = ("expect", "100-continue");
    client.start("POST", MESSAGES, &[BEARER, expect, ("content-length", "2")]);
    assert_eq!(client.head().word(1), "100", "it is waited for");
    let newer = up.login("claude", 3600);
    login::save(&mux.state(), "claude", &newer.claude());
    assert_eq!(client.send("{}").answer().status, 200);
    assert_eq!(up.requests()[0].bearer(), newer.access);
}
