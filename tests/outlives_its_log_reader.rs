//! A log that nobody reads any more, or that cannot be written, stops nothing.

mod common;
use common::*;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Command;
use std::thread;

/// Every kind of line there is: requests, refusals, a refresh, a file that changed, a handler's trouble, the end.
fn live(up: &Upstream, mut mux: Mux) {
    for _ in 0..50 {
        assert_eq!(mux.message().text(), "fine");
        assert_eq!(
            mux.client().request("GET", "/", &[], b"").answer().status,
            401
        );
        assert_eq!(mux.client().send("no request\r\n\r\n").answer().status, 400);
        assert_eq!(
            mux.client()
                .request("GET", "/healthz", &[], b"")
                .answer()
                .status,
            200
        );
    }
    let before = mux.footprint();
    login::save(&mux.state(), "claude", &json!({}));
    assert_eq!(mux.message().status, 503);
    login::save(&mux.state(), "claude", &up.login("claude", -10).claude());
    at_once(0..16, |_| assert_eq!(mux.message().text(), "fine"));
    assert_eq!(up.refreshes().len(), 1);
    mux.assert_recovered(before, 16);
    assert_eq!(mux.stop(), 0);
}

#[test]
fn its_reader_goes_away() {
    for level in ["info", "debug"] {
        let up = Upstream::plain();
        let setup = Setup::new(&up).set("workers", 16).set("log_level", level);
        let pipe = setup.folder.0.join("log");
        let made = Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("run mkfifo").success());
        let script = format!("exec \"$@\" 2>'{}'", pipe.display());
        let reader = thread::spawn(move || {
            let mut lines = BufReader::new(File::open(pipe).expect("open a pipe")).lines();
            lines.any(|line| line.expect("a line").contains("listening on "))
        });
        let mux = setup.shell(&script).start_unheard();
        assert!(
            reader.join().expect("a reader"),
            "it never said that it listens"
        );
        live(&up, mux);
    }
}

#[test]
fn there_was_never_one() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 16);
    live(&up, setup.shell("exec \"$@\" 2>&-").start_unheard());
}

#[test]
fn its_disk_is_full() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 16);
    live(&up, setup.shell("exec \"$@\" 2>/dev/full").start_unheard());
}
