//! A running ai-mux and its log.

use super::client::{Answer, Client};
use super::setup::Setup;
use super::tls::Authority;
use super::upstream::{Shared, Upstream};
use super::{BEARER, Folder, MESSAGES, PATIENCE, lock};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

pub struct Mux {
    child: Child,
    pub addr: SocketAddr,
    log: Arc<Log>,
    config: String,
    pub folder: Folder,
    upstreams: Vec<Arc<Shared>>,
    authority: Option<Authority>,
}

impl Mux {
    /// Runs `command`; `config` is what to show when a test fails.
    pub fn spawn(command: &mut Command, config: String, setup: Setup) -> Mux {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .expect("start ai-mux");
        let stderr = BufReader::new(child.stderr.take().expect("standard error"));
        let log = Arc::new(Log::default());
        let lines = log.clone();
        thread::spawn(move || lines.read(stderr));
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let Setup {
            folder,
            upstreams,
            authority,
            ..
        } = setup;
        Mux {
            child,
            addr,
            log,
            config,
            folder,
            upstreams,
            authority,
        }
    }

    /// With one user and a good login of each provider.
    pub fn start(upstream: &Upstream) -> Mux {
        Setup::new(upstream).start()
    }

    pub fn client(&self) -> Client {
        Client::new(self.addr)
    }

    /// One that speaks TLS if this does.
    pub fn caller(&self) -> Client {
        match &self.authority {
            Some(authority) => Client::tls(self.addr, authority),
            None => self.client(),
        }
    }

    /// One request by `alice` on a connection of its own.
    pub fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.caller()
            .request(method, target, &[&[BEARER], headers].concat(), body)
            .answer()
    }

    /// One plain request by `alice` to Claude.
    pub fn message(&self) -> Answer {
        self.ask("POST", MESSAGES, &[], b"{}")
    }

    pub fn state(&self) -> PathBuf {
        self.folder.0.join("state")
    }

    /// Where it listens, in the order of the log.
    pub fn addrs(&self) -> Vec<SocketAddr> {
        let log = self.log();
        let said = log
            .lines()
            .filter_map(|line| line.split("listening on ").nth(1));
        let place = said.filter_map(|url| url.trim().split("://").nth(1).map(str::to_owned));
        place
            .map(|addr| addr.parse().expect("an address"))
            .collect()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        lock(&self.log.state).text.clone()
    }

    /// The log when the process has ended.
    pub fn whole_log(&self) -> String {
        self.log.wait("the end of the log", |state| state.ended);
        self.log()
    }

    pub fn wait_log(&self, what: &str) {
        self.wait_log_times(what, 1);
    }

    /// Waits until the log has said something that many times.
    pub fn wait_log_times(&self, what: &str, times: usize) {
        self.log
            .wait(what, |state| state.text.matches(what).count() >= times);
    }

    /// The lines of the log that hold `what`.
    pub fn log_lines(&self, what: &str) -> Vec<String> {
        self.log()
            .lines()
            .filter(|line| line.contains(what))
            .map(str::to_owned)
            .collect()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process");
        kill_process(pid, signal).expect("send a signal");
    }

    /// Waits for the end of the process, and of its log: its exit code, or minus the signal that ended it.
    pub fn wait_exit(&mut self) -> i32 {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for ai-mux") {
                self.whole_log();
                return status
                    .code()
                    .unwrap_or_else(|| -status.signal().unwrap_or(0));
            }
            assert!(Instant::now() < deadline, "ai-mux does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to stop and returns its exit code.
    pub fn stop(&mut self) -> i32 {
        self.signal(Signal::TERM);
        self.wait_exit()
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = self.log();
            let transcript: String = self.upstreams.iter().map(|up| up.transcript()).collect();
            eprintln!(
                "--- configuration\n{}\n--- log\n{log}\n--- upstream\n{transcript}",
                self.config
            );
            return;
        }
        let log = self.whole_log();
        for upstream in &self.upstreams {
            let failed = upstream.failed.load(Ordering::SeqCst);
            assert!(!failed, "a script of the upstream has panicked");
            let shown = upstream.vendors.shown(&log);
            assert_eq!(shown, None, "the log shows a secret:\n{log}");
        }
    }
}

#[derive(Default)]
struct Log {
    state: Mutex<LogState>,
    changed: Condvar,
}

#[derive(Default)]
struct LogState {
    text: String,
    ended: bool,
}

impl Log {
    fn read(&self, mut from: impl BufRead) {
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line);
            lock(&self.state).text.push_str(&text);
            self.changed.notify_all();
            line.clear();
        }
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    fn wait(&self, what: &str, done: impl Fn(&LogState) -> bool) {
        let state = lock(&self.state);
        let going = |state: &mut LogState| !done(state) && !state.ended;
        let (state, _) = self
            .changed
            .wait_timeout_while(state, PATIENCE, going)
            .expect("a log");
        assert!(done(&state), "the log never said {what:?}:\n{}", state.text);
    }
}
