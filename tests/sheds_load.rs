//! A pool that is full says so in time, and answers health checks meanwhile; what needs no worker gets none.

mod common;
use common::*;

fn occupy(mux: &Mux, workers: usize) -> Vec<Client> {
    let clients = (0..workers).map(|_| {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
        client.head();
        assert_eq!(client.text(), "one");
        client
    });
    clients.collect()
}

fn assert_whole(client: &mut Client) {
    assert_eq!(client.text(), "two");
    assert_eq!(client.piece().expect("a proper end"), None);
}

#[test]
fn sixty_four_clients_of_a_full_pool_are_told_when_to_come_back() {
    let (up, go) = two_events();
    let setup = Setup::new(&up).set("workers", 4);
    let mux = setup.set("request_timeout", "2s").start();
    let mut busy = occupy(&mux, 4);
    let before = mux.footprint();
    let mut waiting: Vec<_> = (0..64).map(|_| mux.client()).collect();
    for client in &mut waiting {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    for (method, path) in [("GET", "/healthz"), ("HEAD", "/"), ("HEAD", "/claude")] {
        let answer = mux.client().request(method, path, &[], b"").answer();
        assert_eq!(answer.status, 200, "{method} {path} beside a full pool");
    }
    for client in &mut waiting {
        let answer = client.answer();
        assert_eq!(answer.status, 503);
        let wait = answer.header("retry-after").and_then(|s| s.parse().ok());
        assert!(wait.is_some_and(|seconds: u64| seconds > 0), "{wait:?}");
        assert_eq!(answer.header("x-should-retry"), None);
        assert!(answer.error().contains("workers"), "{}", answer.text());
    }
    assert_eq!(up.requests().len(), 4, "none of them reached upstream");
    go.advance();
    busy.iter_mut().for_each(assert_whole);
    drop((busy, waiting));
    mux.assert_recovered(before, 4);
}

/// A pool full of streams says what is wrong with a request as soon as a free one does.
#[test]
fn what_is_refused_anyway_waits_for_no_worker() {
    let (up, go) = two_events();
    let mux = Setup::new(&up).set("workers", 1).start();
    let mut busy = occupy(&mux, 1);
    let cases = [
        (401, MESSAGES, vec![]),
        (401, MESSAGES, vec![("x-api-key", "wrong")]),
        (404, "/claude/v2/messages", vec![BEARER]),
        (426, MESSAGES, vec![BEARER, ("upgrade", "websocket")]),
        (
            413,
            MESSAGES,
            vec![BEARER, ("content-length", "99999999999")],
        ),
    ];
    for (status, path, headers) in cases {
        let answer = mux.client().start("GET", path, &headers).answer();
        assert_eq!(answer.status, status, "{path} {headers:?}");
        assert_eq!(answer.header("x-should-retry"), Some("false"), "{status}");
    }
    go.advance();
    busy.iter_mut().for_each(assert_whole);
    assert_eq!(up.requests().len(), 1);
}

/// Sixty times as many as there are workers, each with a body that never comes.
#[test]
fn a_body_without_a_token_holds_no_worker() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 1).start();
    let before = mux.warm_footprint();
    let forms = [
        ("content-length", "1000000"),
        ("content-length", "10"),
        ("transfer-encoding", "chunked"),
    ];
    let mut clients = Vec::new();
    for (number, form) in forms.into_iter().cycle().take(60).enumerate() {
        let mut client = mux.client();
        let token = if number % 2 == 0 { "wrong" } else { "" };
        client.start("POST", MESSAGES, &[form, ("x-api-key", token)]);
        clients.push(client);
    }
    assert_eq!(mux.message().text(), "fine", "beside 60 bodies to come");
    for client in &mut clients {
        assert_eq!(client.answer().status, 401);
    }
    drop(clients);
    mux.assert_recovered(before, 1);
    assert_eq!(up.requests().len(), 3);
}

/// Streams that take long hold workers, and nothing else: whoever came in between is served as they end.
#[test]
fn whoever_waits_is_served_as_soon_as_a_worker_is_free() {
    let (up, go) = two_events();
    let mux = Setup::new(&up).set("workers", 2).start();
    let mut busy = occupy(&mux, 2);
    let before = mux.footprint();
    let mut waiting: Vec<_> = (0..100).map(|_| mux.client()).collect();
    for client in &mut waiting {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    assert_eq!(up.requests().len(), 2);
    go.advance();
    busy.iter_mut().for_each(assert_whole);
    for client in &mut waiting {
        assert_eq!(client.answer().text(), "fine");
    }
    drop((busy, waiting));
    mux.assert_recovered(before, 2);
}

/// Round after round: those that were told so, or went away, leave nothing behind, and the pool is whole when it is free.
#[test]
fn a_pool_that_stays_full_keeps_nothing_of_those_it_turned_away() {
    let (up, go) = two_events();
    let setup = Setup::new(&up).set("workers", 2);
    let mux = setup.set("request_timeout", "3s").start();
    let mut busy = occupy(&mux, 2);
    let before = mux.footprint();
    for _ in 0..3 {
        let mut waiting: Vec<_> = (0..100).map(|_| mux.client()).collect();
        for client in &mut waiting {
            client.request("POST", MESSAGES, &[BEARER], b"{}");
        }
        let (gone, told) = waiting.split_at_mut(50);
        gone.iter().for_each(|client| client.wire.cut());
        for client in told {
            assert_eq!(client.answer().status, 503);
        }
        drop(waiting);
        mux.assert_settled(before, 0);
    }
    go.advance();
    busy.iter_mut().for_each(assert_whole);
    let (mut one, mut other) = (mux.client(), mux.client());
    for client in [&mut one, &mut other] {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    assert_eq!(
        (one.answer().text(), other.answer().text()),
        ("fine", "fine")
    );
    assert_eq!(up.requests().len(), 4);
}
