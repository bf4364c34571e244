//! What every test shares: the real binary started in a folder of its own, with a configuration, logins
//! and a log, in front of a scripted upstream. Each run ends by asserting that its log holds no secret.
#![allow(dead_code, unused_imports)] // No test uses all of it.

pub mod client;
pub mod disk;
pub mod footprint;
pub mod http;
pub mod login;
pub mod mux;
pub mod setup;
pub mod tls;
pub mod upstream;
pub mod vendor;

pub use client::{Answer, Client};
pub use disk::Disk;
pub use footprint::{Footprint, need_descriptors, own_processor_time};
pub use http::{Head, PATIENCE, Wire};
pub use login::{Login, noise, now};
pub use mux::Mux;
pub use rustix::process::Signal;
pub use serde_json::{Value, json};
pub use setup::Setup;
pub use tls::Authority;
pub use upstream::{Conn, Request, Steps, Upstream};

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs, io, thread};

/// The token of the user `alice`, who is configured unless a test says otherwise.
pub const TOKEN: &str = "wK3vQ9xZ2mB7nR5tY8pL";
pub const BEARER: (&str, &str) = ("authorization", "Bearer wK3vQ9xZ2mB7nR5tY8pL");
pub const MESSAGES: &str = "/claude/v1/messages";
pub const RESPONSES: &str = "/chatgpt/v1/responses";

/// The binary under test: what `AI_MUX` names, or the one that cargo built with these tests, or the one beside the
/// folder of the running example.
pub fn binary() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_ai-mux").map(PathBuf::from);
    let named = env::var_os("AI_MUX").map(PathBuf::from).or(built);
    named.unwrap_or_else(|| {
        let me = env::current_exe().expect("the path of this program");
        me.parent()
            .and_then(Path::parent)
            .expect("a target folder")
            .join("ai-mux")
    })
}

/// Says something even when the test passes; what eprintln! says then, the test runner keeps to itself.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Locks, whatever happened to another holder: a failing test has reported that already.
pub fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs every case on a thread of its own: for those that spend their time waiting.
pub fn at_once<T: Send>(cases: impl IntoIterator<Item = T>, run: impl Fn(T) + Sync) {
    let run = &run;
    thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || run(case));
        }
    });
}

/// Asks again and again until it is so.
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let so = (0..300).any(|_| {
        thread::sleep(Duration::from_millis(100));
        is_so()
    });
    assert!(so, "it never came about: {what}");
}

/// Where a provider is asked for an answer.
pub fn target(provider: &str) -> &'static str {
    match provider {
        "claude" => MESSAGES,
        _ => RESPONSES,
    }
}

/// An upstream that answers what has an `x-held` in two events, the second of which waits for the step, and all else
/// at once.
pub fn two_events() -> (Upstream, Steps) {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |req, conn| {
        if req.head.get("x-held").is_none() {
            return conn.respond(200, &[], b"fine");
        }
        conn.stream(&[])?;
        conn.chunk("one")?;
        held.wait(1);
        conn.chunk("two")?;
        conn.finish()
    });
    (up, go)
}

/// A folder that goes away with its owner.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The program tells of real paths, whatever links lead there.
        let base = env::temp_dir()
            .canonicalize()
            .expect("a folder for folders");
        let path = base.join(format!("ai-mux-test-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path); // of a process that had this id and was killed
        fs::create_dir_all(&path).expect("make a folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
