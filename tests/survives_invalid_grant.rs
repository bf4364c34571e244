//! A refresh that fails for good takes its provider down until a new login; one that fails for now is tried
//! again, and meanwhile the old token serves as long as it lasts.

mod common;
use common::*;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const WORDS: &str = "kZ4mVq8RtYw2";

fn refuse(up: &Upstream, status: u16, body: Value) {
    up.secret(WORDS);
    up.on_refresh(move |_, conn| conn.json(status, &body).map(|()| true));
}

#[test]
fn a_login_that_is_over_is_told_once_and_asked_for_no_more() {
    let terminal = |code: &str| json!({"error": {"code": code, "message": WORDS}});
    let cases = [
        (
            "claude",
            400,
            json!({"error": "invalid_grant", "error_description": WORDS}),
        ),
        ("claude", 401, json!({"error": "unauthorized"})),
        ("claude", 403, json!({})),
        ("claude", 400, json!({"error": " ".repeat(100_000)})),
        (
            "claude",
            404,
            json!({"type": "error", "error": {"type": "not_found_error", "message": WORDS}}),
        ),
        ("chatgpt", 401, terminal("refresh_token_expired")),
        ("chatgpt", 401, terminal("refresh_token_reused")),
        ("chatgpt", 401, terminal("refresh_token_invalidated")),
        ("chatgpt", 400, terminal("refresh_token_reused")),
        (
            "chatgpt",
            401,
            json!({"code": "refresh_token_reused", "message": WORDS}),
        ),
        (
            "chatgpt",
            400,
            json!({"error": {"code": null, "type": "invalid_grant", "message": WORDS}}),
        ),
    ];
    at_once(cases, |(provider, status, body)| {
        let case = format!("{provider} {status} {body}");
        let up = Upstream::plain();
        refuse(&up, status, body);
        let over = up.login(provider, -10);
        let setup = Setup::new(&up).set("refresh_check_interval", "1s");
        let mux = setup.save(provider, &over.file(provider)).start();
        for _ in 0..5 {
            let answer = mux.ask("POST", target(provider), &[], b"{}");
            assert_eq!(answer.status, 503, "{case}");
            assert_eq!(answer.header("x-should-retry"), Some("false"), "{case}");
            let remedy = login::remedy(&mux.state(), provider);
            assert!(
                answer.error().contains(&remedy),
                "{case}: {}",
                answer.text()
            );
        }
        let other = if provider == "claude" {
            "chatgpt"
        } else {
            "claude"
        };
        assert_eq!(
            mux.ask("POST", target(other), &[], b"{}").status,
            200,
            "{case}"
        );
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(up.refreshes().len(), 1, "{case}");
        let errors = mux.log_lines("ERROR");
        assert_eq!(errors.len(), 1, "{case}: {errors:?}");
        assert!(
            errors[0].contains("refresh") && errors[0].contains(provider),
            "{case}: {errors:?}"
        );

        let new = up.login(provider, 3600);
        login::save(&mux.state(), provider, &new.file(provider));
        assert_eq!(
            mux.ask("POST", target(provider), &[], b"{}").status,
            200,
            "{case}"
        );
        assert_eq!(up.refreshes().len(), 1, "{case}");
    });
}

/// Whoever has mended what the vendor did not like touches the file, and need not wait.
#[test]
fn a_changed_file_is_worth_another_try() {
    let up = Upstream::plain();
    refuse(&up, 403, json!({}));
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let mux = setup.start();
    assert_eq!((mux.message().status, mux.message().status), (503, 503));
    assert_eq!(up.refreshes().len(), 1);
    up.refresh_again();
    assert_eq!(mux.message().status, 503);
    let path = login::path(&mux.state(), "claude");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    std::fs::set_permissions(&path, mode).expect("chmod");
    assert_eq!(mux.message().status, 503, "a change of its mode is none");
    let file = std::fs::File::options().append(true).open(path);
    let touched = file.and_then(|f| f.set_modified(std::time::SystemTime::now()));
    touched.expect("touch a file");
    assert_eq!(mux.message().status, 200);
}

/// Another tool has spent the refresh token, and its new one is on disk already: nobody who waits notices.
#[test]
fn a_newer_file_is_taken_instead_of_giving_up() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let (state, newer) = (mux.state(), up.login("claude", 3600));
    let file = newer.claude();
    up.on_refresh(move |_, conn| {
        login::save(&state, "claude", &file);
        conn.json(400, &json!({"error": "invalid_grant"}))
            .map(|()| true)
    });
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[0].bearer(), newer.access);
    assert_eq!(up.refreshes().len(), 1);
    assert_eq!(mux.log_lines("ERROR").len(), 0, "{}", mux.log());
}

/// The refresh token is the same, but the access token beside it is newer, and good.
#[test]
fn a_newer_access_token_is_taken_instead_of_giving_up() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let (old, fresh) = (up.login("claude", -10), up.login("claude", 3600));
    let mut file = old.claude();
    file["claudeAiOauth"]["accessToken"] = json!(fresh.access);
    file["claudeAiOauth"]["expiresAt"] = json!(fresh.expires * 1000);
    login::save(&mux.state(), "claude", &old.claude());
    let state = mux.state();
    up.on_refresh(move |_, conn| {
        login::save(&state, "claude", &file);
        conn.json(400, &json!({"error": "invalid_grant"}))
            .map(|()| true)
    });
    assert_eq!(mux.message().status, 200);
}

#[test]
fn a_spent_refresh_token_is_never_sent_twice() {
    let up = Upstream::plain();
    let over = up.login("claude", -10);
    up.end_login(&over.refresh);
    let mux = Setup::new(&up).save("claude", &over.claude()).start();
    for _ in 0..3 {
        assert_eq!(mux.message().status, 503);
    }
    assert_eq!(up.reused(), 1);
}

#[test]
fn trouble_that_may_pass_is_waited_out() {
    let cases = [
        ("claude", 500),
        ("claude", 503),
        ("claude", 429),
        ("claude", 408),
        ("chatgpt", 500),
        ("chatgpt", 400),
        ("chatgpt", 401),
        ("chatgpt", 403),
        ("chatgpt", 429),
        ("chatgpt", 503),
        ("claude", 0),
        ("chatgpt", 0),
    ];
    at_once(cases, |(provider, way)| {
        let case = format!("{provider} {way}");
        let up = Upstream::plain();
        up.on_refresh(move |_, conn| match way {
            0 => conn.cut().map(|()| true),
            // For ChatGPT these two end a login, but only with a word that says so; no other does, whatever it says.
            400 | 401 => conn.respond(way, &[], b"<html>").map(|()| true),
            status => {
                let word = json!({"error": {"code": "refresh_token_reused"}});
                conn.json(status, &word).map(|()| true)
            }
        });
        let mux = Setup::new(&up)
            .save(provider, &up.login(provider, -10).file(provider))
            .start();
        let told = |answer: &Answer| answer.header("retry-after")?.parse::<u64>().ok();
        let mut known = Instant::now();
        for n in 0..5 {
            let answer = mux.ask("POST", target(provider), &[], b"{}");
            assert_eq!(answer.status, 503, "{case}");
            if n == 0 {
                known = Instant::now(); // the wait had begun by then
            }
            let wait = told(&answer);
            assert!(
                wait.is_some_and(|s: u64| (1..=6).contains(&s)),
                "{case}: {wait:?}"
            );
            assert_eq!(answer.header("x-should-retry"), None, "{case}");
            answer.error();
        }
        assert_eq!(up.refreshes().len(), 1, "{case}: the wait is obeyed");
        mux.wait_log("next try");
        let said = mux.log_lines("next try").remove(0);
        assert!(said.contains("WARN"), "{case}: {said}");
        up.refresh_again();
        // As the answer says: try again when the wait is over.
        let tries = (0..60).find(|_| {
            thread::sleep(Duration::from_millis(250));
            let waited = known.elapsed();
            let answer = mux.ask("POST", target(provider), &[], b"{}");
            // It tells what is left of the wait, in whole seconds, and one more.
            let wait = told(&answer).unwrap_or_default();
            assert!(
                wait as f64 <= (6.0 - waited.as_secs_f64()).max(0.0),
                "{case}: {wait} after {waited:?}"
            );
            answer.status == 200
        });
        assert!(tries.is_some(), "{case}: it never came back");
        assert_eq!(up.refreshes().len(), 2, "{case}");
    });
}

#[test]
fn the_vendors_own_retry_after_is_honoured() {
    for (status, time) in [(429, 120), (503, 120), (503, 3600)] {
        let up = Upstream::plain();
        up.on_refresh(move |_, conn| {
            conn.respond(status, &[("retry-after", &time.to_string())], b"{}")
                .map(|()| true)
        });
        let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
        let answer = setup.start().message();
        assert_eq!(answer.status, 503);
        let wait = answer.header("retry-after").and_then(|s| s.parse().ok());
        assert!(
            wait.is_some_and(|s: u64| (time - 30..=time + 1).contains(&s)),
            "{status}: {wait:?}"
        );
    }
}

/// Even if the vendor's tool keeps other things in the file, and writes them.
#[test]
fn a_retry_after_outlasts_a_change_beside_the_login() {
    let up = Upstream::plain();
    up.on_refresh(|_, conn| {
        conn.respond(429, &[("retry-after", "120")], b"{}")
            .map(|()| true)
    });
    let mut file = up.login("claude", -10).claude();
    let mux = Setup::new(&up).save("claude", &file).start();
    for round in 0..3 {
        assert_eq!(mux.message().status, 503);
        file["mcpOAuth"] = json!({ "round": round });
        login::save(&mux.state(), "claude", &file);
    }
    assert_eq!(up.refreshes().len(), 1);
}

#[test]
fn the_old_token_serves_while_refreshing_fails() {
    let up = Upstream::plain();
    refuse(&up, 500, json!({"error": WORDS}));
    let ageing = up.login("claude", 300);
    let mux = Setup::new(&up).save("claude", &ageing.claude()).start();
    up.wait(1, Request::is_refresh);
    mux.wait_log("refresh");
    for _ in 0..5 {
        assert_eq!(mux.message().status, 200);
    }
    assert!(up.requests().iter().all(|r| r.bearer() == ageing.access));
    assert_eq!(up.refreshes().len(), 1);
}

/// Not only when its token has ended: it will not be renewed, so the owner hears of it now.
#[test]
fn a_login_that_is_over_is_down_even_while_its_token_lasts() {
    let up = Upstream::plain();
    refuse(&up, 400, json!({"error": "invalid_grant"}));
    let ageing = up.login("claude", 300).claude();
    let mux = Setup::new(&up).save("claude", &ageing).start();
    mux.wait_log("ERROR");
    assert_eq!(mux.message().status, 503);
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health.json()["providers"]["claude"], "unavailable");
}

/// From five seconds on, and from there again after one that went well.
#[test]
fn the_wait_doubles_until_a_refresh_goes_well() {
    let up = Upstream::plain();
    refuse(&up, 500, json!({}));
    let mux = Setup::new(&up)
        .save("claude", &up.login("claude", -10).claude())
        .start();
    mux.wait_log("next try in 5s");
    mux.wait_log("next try in 10s");
    up.refresh_again();
    mux.wait_log("claude: refreshed");
    refuse(&up, 500, json!({}));
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    assert_eq!(mux.message().status, 503);
    mux.wait_log_times("next try in 5s", 2);
}

/// By the clock that it is of: ours may be wrong, after a start without a network say.
#[test]
fn a_retry_after_may_be_a_date() {
    for ahead in [0, 86400] {
        let up = Upstream::plain();
        up.on_refresh(move |_, conn| {
            let theirs = SystemTime::now() + Duration::from_secs(ahead);
            let date = httpdate::fmt_http_date(theirs);
            let at = httpdate::fmt_http_date(theirs + Duration::from_secs(120));
            let dates = [("date", date.as_str()), ("retry-after", &at)];
            let dates = if ahead > 0 { &dates[..] } else { &dates[1..] };
            conn.respond(429, dates, b"{}").map(|()| true)
        });
        let ended = up.login("claude", -10).claude();
        let answer = Setup::new(&up).save("claude", &ended).start().message();
        let wait = answer.header("retry-after").and_then(|s| s.parse().ok());
        assert!(
            wait.is_some_and(|s: u64| (90..=121).contains(&s)),
            "{wait:?}"
        );
    }
}

/// Up to five minutes: with a clock that runs a hundred times as fast, this takes seconds.
#[test]
fn the_wait_grows_to_five_minutes() {
    let Some(library) = setup::faketime() else {
        return say("SKIPPED: no faketime, or a static ai-mux, which cannot load it");
    };
    let up = Upstream::plain();
    refuse(&up, 500, json!({}));
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let setup = setup.env("LD_PRELOAD", library).env("FAKETIME", "+0 x100");
    let mux = setup.start();
    mux.wait_log_times("next try in 300s", 2);
    assert!(
        mux.log_lines("next try in 320s").is_empty(),
        "{}",
        mux.log()
    );
}
