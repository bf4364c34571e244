//! A stand-in for both vendors: it records every request as it came, answers by a script that may break
//! any rule, and is their token endpoint too, with refresh tokens that can be spent once.

use super::http::{Framing, Head, PATIENCE, Wire};
use super::lock;
use super::tls::Authority;
use super::vendor::Vendors;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Answers one request. An error, or `conn.cut()`, ends the connection.
pub type Script = dyn Fn(&Request, &mut Conn) -> io::Result<()> + Send + Sync;

#[derive(Clone, Debug)]
pub struct Request {
    pub head: Head,
    pub body: Vec<u8>,
    /// False if the body broke off.
    pub whole: bool,
    /// Which connection it came over, from 1.
    pub connection: usize,
}

pub struct Conn {
    pub wire: Wire,
    keep: bool,
}

pub struct Upstream {
    pub addr: SocketAddr,
    pub shared: Arc<Shared>,
    secure: bool,
}

pub struct Shared {
    script: Box<Script>,
    at_head: bool,
    requests: Mutex<Vec<Request>>,
    changed: Condvar,
    pub vendors: Vendors,
    sockets: Mutex<HashMap<usize, TcpStream>>,
    accepted: AtomicUsize,
    over: AtomicBool,
    /// A script has panicked, which its thread alone would know.
    pub failed: AtomicBool,
}

/// Something that is counted up in one thread and waited for in another.
#[derive(Clone, Default)]
pub struct Steps(Arc<(Mutex<usize>, Condvar)>);

impl Steps {
    pub fn count(&self) -> usize {
        *lock(&self.0.0)
    }

    pub fn advance(&self) {
        *lock(&self.0.0) += 1;
        self.0.1.notify_all();
    }

    /// Waits until `advance` was called `n` times.
    pub fn wait(&self, n: usize) {
        let count = lock(&self.0.0);
        let (count, late) = self
            .0
            .1
            .wait_timeout_while(count, PATIENCE, |count| *count < n)
            .expect("a count");
        assert!(
            !late.timed_out(),
            "waited too long for step {n}, at {count}"
        );
    }
}

impl Upstream {
    /// The script runs when the whole request has been read.
    pub fn start(
        script: impl Fn(&Request, &mut Conn) -> io::Result<()> + Send + Sync + 'static,
    ) -> Upstream {
        Upstream::serve(Box::new(script), false, None)
    }

    /// The script runs after the head, and reads as much of the body as it likes.
    pub fn at_head(
        script: impl Fn(&Request, &mut Conn) -> io::Result<()> + Send + Sync + 'static,
    ) -> Upstream {
        Upstream::serve(Box::new(script), true, None)
    }

    pub fn tls(
        authority: &Authority,
        script: impl Fn(&Request, &mut Conn) -> io::Result<()> + Send + Sync + 'static,
    ) -> Upstream {
        Upstream::serve(Box::new(script), false, Some(authority.clone()))
    }

    pub fn tls_at_head(
        authority: &Authority,
        script: impl Fn(&Request, &mut Conn) -> io::Result<()> + Send + Sync + 'static,
    ) -> Upstream {
        Upstream::serve(Box::new(script), true, Some(authority.clone()))
    }

    /// Answers everything with 200 and a few bytes.
    pub fn plain() -> Upstream {
        Upstream::start(|_, conn| conn.respond(200, &[("content-type", "text/plain")], b"fine"))
    }

    fn serve(script: Box<Script>, at_head: bool, authority: Option<Authority>) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            script,
            at_head,
            requests: Mutex::default(),
            changed: Condvar::new(),
            vendors: Vendors::default(),
            sockets: Mutex::default(),
            accepted: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        });
        let secure = authority.is_some();
        let all = shared.clone();
        thread::spawn(move || {
            for socket in listener.incoming().map(|socket| socket.expect("accept")) {
                if all.over.load(Ordering::SeqCst) {
                    return;
                }
                let (all, authority) = (all.clone(), authority.clone());
                thread::spawn(move || all.connection(socket, authority));
            }
        });
        Upstream {
            addr,
            shared,
            secure,
        }
    }

    pub fn url(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}", self.addr)
    }

    /// A provider in its long form, with this as its upstream.
    pub fn provider(&self, name: &str) -> Value {
        let base = if name == "claude" {
            "/anthropic"
        } else {
            "/backend-api/codex"
        };
        let url = self.url();
        json!({"name": name, "base_url": format!("{url}{base}"), "token_url": format!("{url}/{name}/token")})
    }

    fn recorded(&self, refreshes: bool) -> Vec<Request> {
        let all = lock(&self.shared.requests);
        all.iter()
            .filter(|r| r.is_refresh() == refreshes)
            .cloned()
            .collect()
    }

    /// Every request so far that was no refresh.
    pub fn requests(&self) -> Vec<Request> {
        self.recorded(false)
    }

    pub fn refreshes(&self) -> Vec<Request> {
        self.recorded(true)
    }

    /// Waits until something has been asked that many times.
    pub fn wait(&self, count: usize, what: impl Fn(&Request) -> bool) {
        let all = lock(&self.shared.requests);
        let few = |all: &mut Vec<Request>| all.iter().filter(|r| what(r)).count() < count;
        let waited = self
            .shared
            .changed
            .wait_timeout_while(all, PATIENCE, few)
            .expect("requests");
        assert!(
            !waited.1.timed_out(),
            "waited too long for {count} requests"
        );
    }

    /// How many connections have been accepted.
    pub fn connections(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Ends every open connection, as a server does with idle ones, and waits until the other side's kernel knows:
    /// on a machine under load, what is sent next elsewhere could overtake that.
    pub fn close_connections(&self) {
        for socket in lock(&self.shared.sockets).values() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        // Its own address, ours, its state: 01 is ESTABLISHED, so the end has not come yet (proc_net(5)).
        let ours = format!(":{:04X}", self.addr.port());
        let unheard = |line: &str| {
            let words: Vec<_> = line.split_whitespace().take(4).collect();
            matches!(words[..], [_, _, remote, "01"] if remote.ends_with(&ours))
        };
        let end = Instant::now() + PATIENCE;
        while fs::read_to_string("/proc/net/tcp").is_ok_and(|all| all.lines().any(unheard)) {
            assert!(Instant::now() < end, "nobody hears that they are closed");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.addr);
        for socket in lock(&self.shared.sockets).values() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Shared {
    /// What was asked so far, for a failure's report.
    pub fn transcript(&self) -> String {
        let requests = lock(&self.requests);
        let show = |r: &Request| {
            format!(
                "{}[{} bytes]\n",
                String::from_utf8_lossy(&r.head.raw),
                r.body.len()
            )
        };
        requests.iter().map(show).collect()
    }

    fn connection(&self, socket: TcpStream, authority: Option<Authority>) {
        let number = self.accepted.fetch_add(1, Ordering::SeqCst) + 1;
        let clone = socket.try_clone().expect("clone a socket");
        lock(&self.sockets).insert(number, clone);
        let _watch = Watch(self, number);
        let wire = match authority {
            Some(authority) => authority.accept(socket),
            None => Ok(Wire::plain(socket)),
        };
        if let Ok(wire) = wire {
            let mut conn = Conn { wire, keep: true };
            while conn.keep && matches!(self.exchange(&mut conn, number), Ok(true)) {}
            conn.wire.cut();
        }
    }

    /// Reads one request and has it answered. False at the end of the connection.
    fn exchange(&self, conn: &mut Conn, connection: usize) -> io::Result<bool> {
        let Some(head) = conn.wire.head()? else {
            return Ok(false);
        };
        let mut request = Request {
            head,
            body: Vec::new(),
            whole: false,
            connection,
        };
        if !self.at_head || request.is_refresh() {
            let mut framing = request.head.framing(Framing::Done);
            let read = loop {
                match conn.wire.piece(&mut framing) {
                    Ok(Some(piece)) => request.body.extend(piece),
                    Ok(None) => break Ok(()),
                    Err(e) => break Err(e),
                }
            };
            request.whole = read.is_ok();
            self.record(&request);
            read?;
        } else {
            self.record(&request);
        }
        if request.is_refresh() {
            self.vendors.refresh(&request, conn)?;
        } else if self.vendors.knows(request.bearer()) {
            (self.script)(&request, conn)?;
        } else {
            let error =
                json!({"type": "authentication_error", "message": "upstream knows no such token"});
            conn.json(401, &json!({"type": "error", "error": error}))?;
        }
        Ok(true)
    }

    fn record(&self, request: &Request) {
        lock(&self.requests).push(request.clone());
        self.changed.notify_all();
    }
}

impl Request {
    pub fn is_refresh(&self) -> bool {
        self.head.word(1).trim_end_matches('/').ends_with("/token")
    }

    pub fn provider(&self) -> &str {
        let first = self.head.word(1).split('/').nth(1).unwrap_or_default();
        if first == "anthropic" || first == "claude" {
            "claude"
        } else {
            "chatgpt"
        }
    }

    pub fn bearer(&self) -> &str {
        let value = self.head.get("authorization").unwrap_or_default();
        value.strip_prefix("Bearer ").unwrap_or_default()
    }
}

impl Conn {
    /// A whole answer with its length.
    pub fn respond(
        &mut self,
        status: u16,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<()> {
        let length = body.len().to_string();
        let mut all = headers.to_vec();
        all.push(("content-length", &length));
        self.wire
            .send(&[head(status, &all).as_bytes(), body].concat())
    }

    pub fn json(&mut self, status: u16, body: &Value) -> io::Result<()> {
        self.respond(
            status,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// A head alone, framed by nothing but these headers.
    pub fn head(&mut self, status: u16, headers: &[(&str, &str)]) -> io::Result<()> {
        self.wire.send(head(status, headers).as_bytes())
    }

    /// The head of a chunked answer.
    pub fn stream(&mut self, headers: &[(&str, &str)]) -> io::Result<()> {
        self.head(
            200,
            &[headers, &[("transfer-encoding", "chunked")]].concat(),
        )
    }

    pub fn chunk(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let bytes = bytes.as_ref();
        self.wire
            .send(&[format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())
    }

    pub fn finish(&mut self) -> io::Result<()> {
        self.wire.send(b"0\r\n\r\n")
    }

    /// Ends the connection after this answer, whole or not.
    pub fn cut(&mut self) -> io::Result<()> {
        self.keep = false;
        Ok(())
    }
}

fn head(status: u16, headers: &[(&str, &str)]) -> String {
    let lines: String = headers
        .iter()
        .map(|(n, v)| format!("{n}: {v}\r\n"))
        .collect();
    format!("HTTP/1.1 {status} Whatever\r\n{lines}\r\n")
}

/// Ends a connection, by a panic too: that is noted, and ai-mux is not left waiting on an open socket.
struct Watch<'a>(&'a Shared, usize);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0
            .failed
            .fetch_or(thread::panicking(), Ordering::SeqCst);
        lock(&self.0.sockets).remove(&self.1);
    }
}
