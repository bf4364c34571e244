//! A login is refreshed when it must be, once however many need it, and nobody waits who need not.

mod common;
use common::*;
use std::thread;
use std::time::Duration;

fn new_access(mux: &Mux) -> String {
    let file = login::read(&mux.state(), "claude");
    file["claudeAiOauth"]["accessToken"]
        .as_str()
        .expect("a token")
        .to_owned()
}

/// The refresh at start has come to its end before the requests of a test begin.
fn expired_after_start(up: &Upstream, provider: &str) -> Mux {
    let mux = Setup::new(up).start();
    mux.wait_log(&format!("{provider}: login read"));
    let expired = up.login(provider, -10);
    login::save(&mux.state(), provider, &expired.file(provider));
    mux
}

#[test]
fn fifty_requests_on_an_expired_token_cause_one_refresh() {
    for (provider, target) in [("claude", MESSAGES), ("chatgpt", RESPONSES)] {
        let up = Upstream::plain();
        let mux = expired_after_start(&up, provider);
        let go = up.hold_refreshes();
        let mut clients: Vec<_> = (0..50).map(|_| mux.client()).collect();
        for client in &mut clients {
            client.request("POST", target, &[BEARER], b"{}");
        }
        up.wait(1, Request::is_refresh);
        go.advance();
        for client in &mut clients {
            assert_eq!(client.answer().status, 200);
        }
        assert_eq!((up.refreshes().len(), up.reused()), (1, 0), "{provider}");
        let first = up.requests()[0].bearer().to_owned();
        assert!(
            up.requests().iter().all(|r| r.bearer() == first),
            "{provider}"
        );
        mux.wait_log(&format!("{provider}: refreshed"));
        assert_eq!(mux.log_lines(&format!("{provider}: refreshed")).len(), 1);
    }
}

#[test]
fn each_vendor_is_asked_in_its_own_words() {
    let up = Upstream::plain();
    let logins = ["claude", "chatgpt"].map(|provider| up.login(provider, -10));
    let setup = Setup::bare(&up).save("claude", &logins[0].claude());
    let mux = setup.save("chatgpt", &logins[1].codex()).start();
    mux.wait_log("claude: refreshed");
    mux.wait_log("chatgpt: refreshed");
    let refreshes = up.refreshes();
    let of = |name: &str| {
        refreshes
            .iter()
            .find(|r| r.provider() == name)
            .expect("a refresh")
    };
    let body = |name| serde_json::from_slice::<Value>(&of(name).body).expect("JSON");
    let claude = json!({
        "grant_type": "refresh_token",
        "refresh_token": logins[0].refresh,
        "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
    });
    let chatgpt = json!({
        "grant_type": "refresh_token",
        "refresh_token": logins[1].refresh,
        "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
        "scope": "openid profile email",
    });
    assert_eq!((body("claude"), body("chatgpt")), (claude, chatgpt));
    for request in &refreshes {
        assert_eq!(request.head.word(0), "POST");
        assert!(
            request
                .head
                .get("content-type")
                .is_some_and(|t| t.starts_with("application/json"))
        );
        assert_eq!(request.head.get("authorization"), None);
    }
}

#[test]
fn a_good_token_is_left_alone() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("refresh_check_interval", "1s").start();
    for _ in 0..3 {
        assert_eq!(mux.message().status, 200);
        thread::sleep(Duration::from_millis(600));
    }
    assert_eq!(up.refreshes().len(), 0);
}

/// It ends before the next look, in ten minutes, and a minute more: refreshed at once, in the background.
#[test]
fn an_ageing_token_serves_while_it_is_refreshed() {
    let up = Upstream::plain();
    let go = up.hold_refreshes();
    let login = up.login("claude", 650);
    let mux = Setup::new(&up).save("claude", &login.claude()).start();
    up.wait(1, Request::is_refresh);
    for _ in 0..5 {
        assert_eq!(mux.message().status, 200);
    }
    assert!(up.requests().iter().all(|r| r.bearer() == login.access));
    go.advance();
    mux.wait_log("claude: refreshed");
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[5].bearer(), new_access(&mux));
    assert_ne!(new_access(&mux), login.access);
    assert_eq!(up.refreshes().len(), 1);
}

/// With a look every second, or with a little more left than ten minutes and one, no refresh is needed yet.
#[test]
fn the_next_look_decides_what_is_ageing() {
    at_once([(300, Some("1s")), (700, None)], |(left, interval)| {
        let up = Upstream::plain();
        let mut setup = Setup::new(&up).save("claude", &up.login("claude", left).claude());
        if let Some(time) = interval {
            setup = setup.set("refresh_check_interval", time);
        }
        let mux = setup.start();
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(mux.message().status, 200);
        assert_eq!(up.refreshes().len(), 0, "{left} s left");
    });
}

#[test]
fn the_background_refreshes_with_no_request() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("refresh_check_interval", "1s").start();
    let ageing = up.login("chatgpt", 50);
    login::save(&mux.state(), "chatgpt", &ageing.codex());
    mux.wait_log("chatgpt: refreshed");
    assert_eq!((up.refreshes().len(), up.requests().len()), (1, 0));
}

#[test]
fn a_token_that_ends_within_a_minute_is_refreshed_before_it_is_used() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).start();
    mux.wait_log("claude: login read"); // or the look at start could be the one that refreshes
    let login = up.login("claude", 45);
    login::save(&mux.state(), "claude", &login.claude());
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.refreshes().len(), 1);
    assert_eq!(up.requests()[0].bearer(), new_access(&mux));
    assert_ne!(up.requests()[0].bearer(), login.access);
}

/// In its last minute one request renews the token; the others need not wait for that one.
#[test]
fn in_the_last_minute_one_refreshes_and_the_others_use_the_old_token() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    mux.wait_log("claude: login read"); // as above
    let go = up.hold_refreshes();
    let login = up.login("claude", 45);
    login::save(&mux.state(), "claude", &login.claude());
    let mut first = mux.client();
    first.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, Request::is_refresh);
    for _ in 0..5 {
        assert_eq!(mux.message().status, 200);
    }
    assert!(up.requests().iter().all(|r| r.bearer() == login.access));
    go.advance();
    assert_eq!(first.answer().status, 200);
    assert_eq!(up.requests()[5].bearer(), new_access(&mux));
    assert_eq!(up.refreshes().len(), 1);
}

#[test]
fn a_client_that_hangs_up_does_not_stop_a_refresh() {
    let up = Upstream::plain();
    let mux = expired_after_start(&up, "claude");
    let go = up.hold_refreshes();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, Request::is_refresh);
    client.wire.cut();
    drop(client);
    go.advance();
    mux.wait_log("claude: refreshed");
    assert_eq!(mux.message().status, 200);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

#[test]
fn providers_do_not_wait_for_each_other() {
    let up = Upstream::plain();
    let mux = expired_after_start(&up, "claude");
    let go = up.hold_refreshes();
    let mut waiting = mux.client();
    waiting.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, Request::is_refresh);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    go.advance();
    assert_eq!(waiting.answer().status, 200);
}

/// What the vendor leaves out of its answer stays as it was.
#[test]
fn an_answer_without_a_refresh_token_keeps_the_old_one() {
    let up = Upstream::plain();
    let kept = up.login("claude", -10);
    let fresh = up.login("claude", 3600);
    let access = fresh.access.clone();
    up.on_refresh(move |_, conn| {
        let answer = json!({"access_token": access, "expires_in": 3600, "token_type": "Bearer"});
        conn.json(200, &answer).map(|()| true)
    });
    let mux = Setup::new(&up).save("claude", &kept.claude()).start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[0].bearer(), fresh.access);
    let file = login::read(&mux.state(), "claude");
    assert_eq!(file["claudeAiOauth"]["refreshToken"], json!(kept.refresh));
    assert_eq!(file["claudeAiOauth"]["accessToken"], json!(fresh.access));
    // So another tool's may stand beside it again: it was not spent for good.
    let mut theirs = up.login("claude", 3600);
    theirs.refresh = kept.refresh;
    login::save(&mux.state(), "claude", &theirs.claude());
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.requests()[1].bearer(), theirs.access);
    assert!(mux.log_lines("ERROR").is_empty(), "{}", mux.log());
}

/// A lifetime of nonsense counts as a minute or as 30 days.
#[test]
fn a_lifetime_is_taken_between_a_minute_and_thirty_days() {
    for (said, taken) in [
        (json!(1), 60),
        (json!(0), 60),
        (json!(-5), 60),
        (json!(999_999_999), 30 * 86_400),
    ] {
        let up = Upstream::plain();
        let (old, fresh) = (up.login("claude", -10), up.login("claude", 0));
        let answer = json!({"access_token": fresh.access, "refresh_token": fresh.refresh, "expires_in": said});
        up.on_refresh(move |_, conn| conn.json(200, &answer).map(|()| true));
        let before = now();
        let mux = Setup::new(&up).save("claude", &old.claude()).start();
        mux.wait_log("claude: refreshed");
        let file = login::read(&mux.state(), "claude");
        let expires = file["claudeAiOauth"]["expiresAt"]
            .as_u64()
            .expect("milliseconds")
            / 1000;
        assert!(
            (before + taken..=now() + taken).contains(&expires),
            "{said}: {expires}"
        );
    }
}

/// A new refresh token is not lost for want of an access token beside it: the old one has been spent.
#[test]
fn an_answer_with_nothing_but_a_refresh_token_is_kept() {
    let up = Upstream::plain();
    let (old, new) = (up.login("chatgpt", 30), up.login("chatgpt", 3600));
    let fresh = new.refresh.clone();
    up.on_refresh(move |_, conn| {
        conn.json(200, &json!({"refresh_token": fresh}))
            .map(|()| true)
    });
    let mux = Setup::new(&up).save("chatgpt", &old.codex()).start();
    mux.wait_log("chatgpt: refreshed");
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    let file = login::read(&mux.state(), "chatgpt");
    assert_eq!(file["tokens"]["refresh_token"], json!(new.refresh));
    assert_eq!(file["tokens"]["access_token"], json!(old.access));
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

#[test]
fn at_the_address_that_is_configured() {
    let up = Upstream::plain();
    let url = format!("{}/claude/token/", up.url());
    let setup = Setup::new(&up).provider(0, "token_url", url);
    let ended = up.login("claude", -10);
    let mux = setup.save("claude", &ended.claude()).start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(up.refreshes()[0].head.word(1), "/claude/token/");
}

/// The vendor's own tool would take a time that is past for a login that has ended.
#[test]
fn where_no_lifetime_is_told_the_file_says_an_hour() {
    let up = Upstream::plain();
    let (old, fresh) = (up.login("claude", -10), up.login("claude", 3600));
    let answer = json!({"access_token": fresh.access, "refresh_token": fresh.refresh});
    up.on_refresh(move |_, conn| conn.json(200, &answer).map(|()| true));
    let before = now();
    let mux = Setup::new(&up).save("claude", &old.claude()).start();
    mux.wait_log("claude: refreshed");
    let file = login::read(&mux.state(), "claude");
    let expires = file["claudeAiOauth"]["expiresAt"].as_u64();
    let expires = expires.expect("a time") / 1000;
    assert!(
        (before + 3600..=now() + 3600).contains(&expires),
        "{expires}"
    );
}
