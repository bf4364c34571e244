//! Without descriptors left, new clients wait; when there are some again, they are served.

mod common;
use common::*;
use rustix::process::{Resource, getrlimit};
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn few_descriptors(up: &Upstream) -> Mux {
    let setup = Setup::new(up).set("workers", 16);
    setup.shell("ulimit -n 128; exec \"$@\"").start()
}

#[test]
fn four_hundred_connections_against_128_descriptors() {
    need_descriptors(4096);
    let up = Upstream::plain();
    let mux = few_descriptors(&up);
    let before = mux.warm_footprint();
    let silent: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(mux.addr).expect("connect to ai-mux"))
        .collect();
    assert_eq!(mux.message().text(), "fine", "beside 400 silent ones");
    drop(silent);
    mux.assert_recovered(before, 16);
}

/// The limit that holds at first is only what a process has by default.
#[test]
fn a_limit_that_may_be_raised_is() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).shell("ulimit -Sn 64; exec \"$@\"").start();
    assert!(mux.log_lines("raise the limit").is_empty(), "it is told");
    assert_eq!(mux.message().text(), "fine");
    assert!(mux.limit_descriptors(64) > 64, "it was not raised");
}

#[test]
fn four_hundred_clients_that_ask_are_all_answered() {
    need_descriptors(4096);
    let up = Upstream::plain();
    let mux = few_descriptors(&up);
    let before = mux.warm_footprint();
    let mut clients = Vec::new();
    for _ in 0..400 {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER], b"{}");
        clients.push(client);
    }
    for client in &mut clients {
        assert_eq!(client.answer().text(), "fine");
    }
    drop(clients);
    assert_eq!(up.requests().len(), 401);
    mux.assert_recovered(before, 16);
}

/// The limit falls below what is open already, so that not one more can be opened. Twice: the
/// listener comes to no harm, and each shortage is one warning, however often accept is tried.
#[test]
fn when_none_is_left_a_client_waits_and_is_served_later() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 4).set("log_level", "debug");
    let mux = setup.start();
    let before = mux.warm_footprint();
    for shortage in 1..=2 {
        let old = mux.limit_descriptors(3);
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER], b"{}");
        let (asked, tried) = (up.requests().len(), mux.log_lines("connections wait").len());
        mux.wait_log_times("new connections wait", tried + 3);
        assert_eq!(up.requests().len(), asked);
        mux.limit_descriptors(old);
        assert_eq!(client.answer().text(), "fine");
        drop(client);
        let lines = mux.log_lines("new connections wait");
        let warned = lines.iter().filter(|line| line.starts_with("WARN"));
        assert_eq!(warned.count(), shortage, "{lines:?}");
        mux.assert_recovered(before, 4);
    }
}

/// A system call that is interrupted may fail then: here accept(2) within tiny_http, where nobody connects any more.
#[test]
fn a_pause_while_none_is_left_costs_no_worker() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 1).start();
    let before = mux.warm_footprint();
    let old = mux.limit_descriptors(3);
    mux.signal(Signal::STOP);
    let stat = format!("/proc/{}/stat", mux.pid());
    let stopped = || fs::read_to_string(&stat).is_ok_and(|text| text.contains(") T "));
    wait_until("it has stopped", stopped);
    mux.signal(Signal::CONT);
    mux.wait_log("tiny_http");
    mux.limit_descriptors(old);
    for _ in 0..3 {
        assert_eq!(mux.message().text(), "fine");
    }
    mux.assert_recovered(before, 1);
}

/// A worker that cannot reach upstream says so and lives on; and a file that cannot be opened just now is no log-out.
#[test]
fn a_request_that_needs_one_more_fails_alone() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let mut client = mux.client();
    let mut ask = || client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
    assert_eq!(ask().text(), "fine");
    let before = mux.footprint();
    up.close_connections();
    let new = up.login("claude", 3600);
    let old = mux.limit_descriptors(3);
    login::save(&mux.state(), "claude", &new.claude());
    for _ in 0..3 {
        let answer = ask();
        assert_eq!(answer.status, 502);
        answer.error();
    }
    mux.limit_descriptors(old);
    assert_eq!(ask().text(), "fine");
    assert_eq!(up.requests().pop().expect("a request").bearer(), new.access);
    drop(client);
    mux.assert_recovered(before, 4);
}

/// Nor is a thread for a worker: once there is one, the request is served.
#[test]
fn when_no_thread_is_to_be_had_a_request_waits() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).unprivileged().start();
    if !limit_threads(&mux, Some(1)) {
        return say("SKIPPED: no prlimit here, or root's threads have no limit");
    }
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    mux.wait_log("start a worker");
    // Whatever else the gate does meanwhile, it says so once in a while, and no oftener.
    let mut other = mux.client();
    for _ in 0..100 {
        assert_eq!(
            other.request("GET", "/healthz", &[], b"").answer().status,
            200
        );
    }
    let said = mux.log_lines("start a worker").len();
    assert!(said < 10, "{said} times");
    let old = getrlimit(Resource::Nproc).current;
    assert!(limit_threads(&mux, old), "raise the limit");
    assert_eq!(client.answer().text(), "fine");
}

/// Nor one for the look-up of a name, which is upstream's trouble then.
#[test]
fn when_no_thread_is_to_be_had_a_name_is_not_found() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).unprivileged().start();
    let mut client = mux.client();
    let head = [BEARER, ("expect", "100-continue"), ("content-length", "2")];
    client.start("POST", MESSAGES, &head);
    assert_eq!(
        client.head().start,
        "HTTP/1.1 100 Continue",
        "a worker has it"
    );
    if !limit_threads(&mux, Some(1)) {
        return say("SKIPPED: no prlimit here, or root's threads have no limit");
    }
    client.send("{}");
    let answer = client.answer();
    assert_eq!(answer.status, 502, "{}", answer.error());
    let old = getrlimit(Resource::Nproc).current;
    assert!(limit_threads(&mux, old), "raise the limit");
    assert_eq!(mux.message().text(), "fine");
}

/// What waits for many descriptors at once has a limit too.
#[test]
fn when_there_are_more_than_may_be_the_idle_ones_make_room() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    let mut idle: Vec<_> = (0..6).map(|_| mux.client()).collect();
    for client in &mut idle {
        assert_eq!(
            client.request("GET", "/healthz", &[], b"").answer().status,
            200
        );
    }
    let old = mux.limit_descriptors(3);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    mux.wait_log("new connections wait");
    assert!(idle[0].closed(), "the longest idle one");
    mux.limit_descriptors(old);
    assert_eq!(client.answer().text(), "fine");
    drop((client, idle));
    mux.assert_recovered(before, 4);
}

/// Allows it no new thread while all processes of its user have `most` together. Root has no such bound.
fn limit_threads(mux: &Mux, most: Option<u64>) -> bool {
    let most = most.map_or("unlimited".to_owned(), |most| most.to_string());
    let owner = fs::metadata(format!("/proc/{}", mux.pid())).expect("the process");
    let mut prlimit = Command::new("prlimit");
    prlimit.arg(format!("--pid={}", mux.pid()));
    prlimit.arg(format!("--nproc={most}:"));
    prlimit.uid(owner.uid()).gid(owner.gid());
    owner.uid() != 0 && prlimit.status().is_ok_and(|status| status.success())
}
