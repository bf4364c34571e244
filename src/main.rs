//! ai-mux lets the owner of a Claude or ChatGPT subscription reach it from their own devices
//! with a plain bearer token: it checks that token, swaps in the subscription's OAuth token,
//! keeps that one fresh and safely on disk, and streams the answer back as it comes.
//!
//! ```text
//! client ══ TCP/TLS ══> gate ── head only ──> tiny_http ──> queue ──> worker ──> ureq ══> upstream
//!    ^                   │ one of N inner connections                   │
//!    │                   └─ parks the client's stream ────────────────> takes it: token, body,
//!    └───────────────────────── answer, piece by piece ──────────────── then gives it back
//!
//! credential file <── keeper, one thread a provider ──> token endpoint
//! ```
//!
//! tiny_http parses, queues and hands out requests, but never meets the network: on its own it
//! has no deadlines, hangs under a burst of connections, and aborts on an absurd Content-Length.
//! The **gate** meets the network: it reads one head, refuses what is malformed or ambiguous,
//! *parks* the client's stream as an **exchange** under a number, and passes the head alone, that
//! number first, to tiny_http over an **inner connection**. The **worker** that gets the request
//! takes the exchange, is the only one to read the body and write the answer, and ends with a
//! **verdict** on what becomes of the stream. An inner connection checked out is a **permit**:
//! there are as many as workers, so who holds one has a free worker. A **reply** is an answer of
//! ai-mux's own; everything else that a client hears comes from **upstream**.
//!
//! The file reads from the story to the reference: limits, main, gate, server, handler,
//! credential, upstream, stream, config, replies and errors, log. A callee stands below its caller.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::{Display, Write as _};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{LevelFilter, debug, error, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;
use subtle::ConstantTimeEq;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, TRANSFER_ENCODING};
use ureq::http::{self, HeaderMap, HeaderName, HeaderValue};

use secret::Secret;

// ─── limits ──────────────────────────────────────────────────────────────────────────────────
// Every bound of the program, with its reason. Sizes are bytes.

/// A request head, request line and all fields; the fields that no real client exceeds.
const HEAD_SIZE: usize = 32 << 10;
const FIELD_COUNT: usize = 100;
/// One line of a head. Must fit ureq's output buffer, which takes a header line whole.
const LINE_SIZE: usize = 8 << 10;
/// For a TLS handshake, and for a head from its first byte.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Between two requests. Clients pool connections for a minute or two.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// A request body; both vendors refuse larger ones themselves.
const BODY_SIZE: u64 = 64 << 20;
/// The part of a body that is held in memory so that it can be sent a second time.
const HELD_SIZE: u64 = 1 << 20;
/// A body may be waited for this long, and a second more for each `BODY_RATE` that came of it.
const BODY_GRACE: Duration = Duration::from_secs(10);
const BODY_RATE: u64 = 1 << 10;
/// What is read from upstream and written to the client in one go, and how long that may take.
const PIECE_SIZE: usize = 16 << 10;
const PIECE_TIME: Duration = Duration::from_secs(30);
/// How much of an unread body is taken after a reply, so that the client comes to read it.
const LINGER_SIZE: usize = 1 << 20;
const LINGER_TIME: Duration = Duration::from_secs(2);
/// A head that no worker has picked up by then was lost inside tiny_http.
const PICKUP_TIME: Duration = Duration::from_secs(5);
/// Client connections beyond those that workers serve: each is a thread of some 10 KiB.
const SPARE_CONNECTIONS: u64 = 1024;
/// Descriptors for listeners, log, files, name resolution and token calls; and per worker, for
/// its inner connection (three, as tiny_http clones its end) and one upstream.
const SPARE_DESCRIPTORS: u64 = 32;
const WORKER_DESCRIPTORS: u64 = 4;
/// Virtual size of our threads' stacks; debug builds of the TLS code need the most.
const STACK_SIZE: usize = 512 << 10;
/// ureq's buffers, per upstream connection: an answer's head must fit the first, a header line
/// of ours the second. Larger ones gain nothing, as each piece is passed on at once.
const UPSTREAM_INPUT: usize = 16 << 10;
const UPSTREAM_OUTPUT: usize = LINE_SIZE + 1024;
/// An idle upstream connection; most servers close theirs after 20 s or more.
const UPSTREAM_IDLE: Duration = Duration::from_secs(15);
/// A credential file; real ones have 1 to 10 KiB.
const FILE_SIZE: u64 = 1 << 20;
/// A file changed this recently may change again within one tick of its clock.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// A call to a token endpoint, and its answer.
const TOKEN_TIME: Duration = Duration::from_secs(30);
const TOKEN_SIZE: u64 = 64 << 10;
/// An access token with less than this left is refreshed; one that is younger is not.
const TOKEN_MARGIN: Duration = Duration::from_secs(60);
/// What is believed of `expires_in`, in seconds.
const LIFETIME_MIN: f64 = 60.0;
const LIFETIME_MAX: f64 = 30.0 * 86400.0;
/// Between refreshes that fail: the first wait, doubling up to the second.
const BACKOFF_MIN: Duration = Duration::from_secs(5);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// The longest `Retry-After` that is honoured, lest a mistake shut a provider for weeks.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(86400);
/// After a signal: for running requests, and for a refresh until it is saved.
const DRAIN_TIME: Duration = Duration::from_secs(10);
const STOP_TIME: Duration = Duration::from_secs(30);
/// How often the certificate files are looked at.
const RENEWAL_CHECK: Duration = Duration::from_secs(5);

// ─── main ────────────────────────────────────────────────────────────────────────────────────
// In: the command line, signals. Out: an exit code: 0, 1 for a failure to start or run, 2 for
// a bad command line or configuration.

const HELP: &str = "\
ai-mux: your own Claude or ChatGPT subscription, from all your own devices

usage: ai-mux [--config PATH]

  --config PATH   configuration, YAML, or JSON when PATH ends in .json; without it, all defaults
  --help          this text
  --version       the version
";

#[cfg_attr(test, allow(dead_code))]
fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    // Not eprintln!, which panics when nobody reads standard error.
    let _ = writeln!(io::stderr(), "ai-mux: {}", error.message);
    ExitCode::from(error.code)
}

fn run() -> Result<(), Error> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments
        .iter()
        .map(|a| a.to_str().unwrap_or("?"))
        .collect();
    let path = match words[..] {
        [] => None,
        ["--config", _] => Some(Path::new(&arguments[1])),
        ["--help"] => {
            print(HELP);
            return Ok(());
        }
        ["--version"] => {
            print(concat!("ai-mux ", env!("CARGO_PKG_VERSION"), "\n"));
            return Ok(());
        }
        _ => {
            return Err(Error::config(
                "expected `--config PATH` or nothing; see ai-mux --help",
            ));
        }
    };
    let config = Config::load(path)?;
    start_log(config.log_level);
    let signal = signals().map_err(|e| Error::start("register for signals", e))?;
    let _claim = claim(&config.state_dir)?;
    let proxy = Arc::new(Proxy::new(&config)?);
    let (gate, listeners) = Gate::open(&config, &proxy)?;
    let keepers = proxy.start_keepers(config.refresh_check_interval)?;
    gate.accept(listeners, &signal);

    info!("stopping, once running requests and refreshes have ended");
    let deadline = Instant::now() + STOP_TIME;
    gate.drain(Instant::now() + DRAIN_TIME);
    proxy.stop_keepers(keepers, deadline);
    info!("stopped");
    Ok(())
}

fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// The read end of a pipe that gets a byte at the first SIGTERM or SIGINT; the second one ends
/// the process at once, with exit code 1.
fn signals() -> io::Result<UnixStream> {
    use signal_hook::{consts, flag, low_level};
    let (reader, writer) = UnixStream::pair()?;
    let seen = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGTERM, consts::SIGINT] {
        flag::register_conditional_shutdown(signal, 1, seen.clone())?;
        flag::register(signal, seen.clone())?;
        low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

/// Creates the state folder, private, and locks it: two processes that refresh one login with
/// the same single-use token would end it. The lock lives as long as the file it returns.
fn claim(state_dir: &Path) -> Result<File, Error> {
    let name = state_dir.display();
    let failed = |e| Error::start(format!("state_dir {name}"), e);
    if !state_dir.is_dir() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(failed)?;
    }
    let folder = File::open(state_dir).map_err(failed)?;
    match folder.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::Error(e)) => warn!("state_dir {name} cannot be locked: {e}"),
        Err(fs::TryLockError::WouldBlock) => {
            let what = "another ai-mux uses it; stop that one, or give this one its own";
            return Err(failed(io::Error::other(what)));
        }
    }
    Ok(folder)
}

/// Takes a lock whatever a panicking thread left behind: every state here is valid after each
/// statement, and nothing is computed or waited for while a lock is held.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
    let outcome = condvar.wait_timeout(guard, time);
    outcome.unwrap_or_else(|poisoned| poisoned.into_inner()).0
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_SIZE)
        .spawn(work)
}

// ─── gate ────────────────────────────────────────────────────────────────────────────────────
// In: client connections. Out: to tiny_http, heads that are well-formed and unambiguous, each
// with its exchange parked; to the client, only what is decided without a worker: a malformed
// head, a health answer, a full pool. No body passes here but what is drained after a reply.

struct Gate {
    proxy: Arc<Proxy>,
    tls: Option<Arc<rustls::ServerConfig>>,
    inner: Inner,
    capacity: usize,
    /// By number; touched when a connection comes, goes, or turns from idle to busy and back.
    connections: Mutex<HashMap<u64, Connection>>,
    /// A connection has gone or become idle.
    freed: Condvar,
    stopping: AtomicBool,
}

/// What the gate remembers of a connection that some thread serves.
struct Connection {
    socket: Arc<TcpStream>,
    /// Since when no request of it is being served; `None` while one is.
    idle: Option<Instant>,
}

/// What a worker says becomes of a stream. A worker that says nothing has broken it.
enum Verdict {
    /// Answered whole: the next head may come.
    Next(Stream),
    /// Answered for the last time: shut for writing, and drained so that the client reads it.
    Linger(Stream),
    /// The connection is gone, without a final chunk or TLS close_notify.
    Broken,
}

impl Gate {
    fn open(config: &Config, proxy: &Arc<Proxy>) -> Result<(Arc<Gate>, Vec<TcpListener>), Error> {
        let (workers, capacity) = descriptors(config.workers as u64)?;
        let tls = config.tls.as_ref().map(Renewal::start).transpose()?;
        let listeners = listen(&config.listen)?;
        let inner = Inner::open(config, workers, proxy);
        let inner = inner.map_err(|e| Error::start("open the inner connections", e))?;
        for listener in &listeners {
            let address = listener
                .local_addr()
                .map_err(|e| Error::start("listen", e))?;
            if proxy.users.is_empty() && !address.ip().is_loopback() {
                warn!("no users configured: whoever reaches {address} uses your subscription");
            }
            info!(
                "listening on http{}://{address}",
                if tls.is_some() { "s" } else { "" }
            );
        }
        let gate = Gate {
            proxy: proxy.clone(),
            tls,
            inner,
            capacity,
            connections: Mutex::default(),
            freed: Condvar::new(),
            stopping: AtomicBool::new(false),
        };
        Ok((Arc::new(gate), listeners))
    }

    /// Accepts connections until a signal comes: a thread for each, the longest idle one making
    /// room at the cap. While all are busy, or descriptors have run out, new ones wait in the
    /// listeners' queues.
    fn accept(self: &Arc<Gate>, listeners: Vec<TcpListener>, signal: &UnixStream) {
        let (mut number, mut warned) = (0, false);
        loop {
            let mut sources = vec![PollFd::new(signal, PollFlags::IN)];
            sources.extend(listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)));
            let _ = poll(&mut sources, None); // if interrupted, nothing is ready
            let mut ready = sources.iter().map(|s| !s.revents().is_empty());
            if ready.next() == Some(true) {
                return;
            }
            for (_, listener) in ready.zip(&listeners).filter(|(ready, _)| *ready) {
                number += 1;
                let accepted = self.make_room().and_then(|()| listener.accept());
                match accepted.and_then(|(socket, peer)| self.admit(number, socket, peer)) {
                    Ok(()) => warned = false,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => {
                        if !std::mem::replace(&mut warned, true) {
                            warn!("new connections wait: {e}");
                        }
                        self.close_idle(1);
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
    }

    fn make_room(&self) -> io::Result<()> {
        let count = lock(&self.connections).len();
        if count < self.capacity || self.close_idle(count + 1 - self.capacity) > 0 {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "all {count} that there may be are busy"
        )))
    }

    /// Shuts the longest idle connections, `count` at most; their threads then end by themselves.
    fn close_idle(&self, count: usize) -> usize {
        let mut connections = lock(&self.connections);
        let idle = connections
            .iter()
            .filter_map(|(number, c)| Some((c.idle?, *number)));
        let mut idle: Vec<_> = idle.collect();
        idle.sort_unstable();
        idle.truncate(count);
        for connection in idle
            .iter()
            .filter_map(|(_, number)| connections.remove(number))
        {
            let _ = connection.socket.shutdown(Shutdown::Both);
        }
        idle.len()
    }

    fn admit(self: &Arc<Gate>, number: u64, tcp: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        tcp.set_nonblocking(false)?;
        tcp.set_nodelay(true)?;
        let socket = Arc::new(tcp);
        let connection = Connection {
            socket: socket.clone(),
            idle: Some(Instant::now()),
        };
        lock(&self.connections).insert(number, connection);
        let gate = self.clone();
        let thread = spawn("client", move || {
            // After a panic the connection is closed, and its place free, as after any other end.
            let _ = catch_unwind(AssertUnwindSafe(|| gate.converse(number, socket, peer)));
            lock(&gate.connections).remove(&number);
            gate.freed.notify_all();
        });
        if thread.is_err() {
            lock(&self.connections).remove(&number);
        }
        thread.map(drop)
    }

    /// One client connection, from handshake to close: a head, an exchange, a verdict, again.
    fn converse(&self, number: u64, socket: Arc<TcpStream>, peer: SocketAddr) {
        let mut stream = Stream::new(socket);
        if let Some(tls) = &self.tls
            && let Err(e) = stream.handshake(tls.clone())
        {
            return debug!("peer={peer} TLS handshake: {e}");
        }
        while self.turn(number, true) {
            let verdict = match stream.read_head() {
                Ok(Some(head)) if self.turn(number, false) => self.exchange(stream, head, peer),
                Ok(_) => return,
                Err(reply) => conclude(stream, Access::new(peer), Err(reply.into()), true),
            };
            match verdict {
                Verdict::Next(next) => stream = next,
                Verdict::Linger(last) => return last.linger(),
                Verdict::Broken => return,
            }
        }
    }

    /// Notes whether a connection is idle; false when it was closed to make room, or is to end
    /// because the program does.
    fn turn(&self, number: u64, idle: bool) -> bool {
        let mut connections = lock(&self.connections);
        let stopping = idle && self.stopping.load(Ordering::SeqCst);
        let Some(connection) = connections.get_mut(&number) else {
            return false;
        };
        connection.idle = idle.then(Instant::now);
        !stopping
    }

    /// One request: answered here, or by a worker to whom the stream is lent.
    fn exchange(&self, stream: Stream, head: Head, peer: SocketAddr) -> Verdict {
        let mut access = Access::new(peer);
        access.method = head.method.clone();
        access.path = head.path().to_owned();
        let last = head.close || head.framing != Framing::Empty;
        if is_health(&head.method, head.path()) {
            let health = Reply::new(200, self.proxy.health());
            return conclude(stream, access, Err(health.into()), last);
        }
        match self.inner.exchange(stream, head, peer) {
            Ok(verdict) => verdict,
            Err((stream, reply)) => conclude(*stream, access, Err(reply.into()), last),
        }
    }

    /// Closes idle connections and waits for the busy ones.
    fn drain(&self, deadline: Instant) {
        self.stopping.store(true, Ordering::SeqCst);
        self.close_idle(usize::MAX);
        let mut connections = lock(&self.connections);
        while !connections.is_empty() && !left_until(deadline).is_zero() {
            connections = wait(&self.freed, connections, left_until(deadline));
        }
        if !connections.is_empty() {
            warn!("{} requests still ran and are cut short", connections.len());
        }
        self.inner.remove();
    }
}

fn is_health(method: &str, path: &str) -> bool {
    match method {
        "GET" => path == "/healthz",
        "HEAD" => matches!(path, "/healthz" | "/" | "/claude" | "/chatgpt"),
        _ => false,
    }
}

/// Our end of the way to tiny_http: exactly `workers` connections over a private Unix socket,
/// kept and each proven, for a burst of new ones would leave tiny_http dead to most of them
/// (tiny_http 0.12, util/task_pool.rs: it counts waiting threads before they have taken work).
struct Inner {
    path: PathBuf,
    /// A temporary folder that ends with us, where the socket could not be in `state_dir`.
    folder: Option<PathBuf>,
    exchanges: Arc<Exchanges>,
    /// How long a request waits for a permit: `request_timeout`.
    patience: Duration,
    /// Those not checked out; `None` is one that must be opened anew.
    idle: Mutex<Vec<Option<UnixStream>>>,
    freed: Condvar,
}

/// Parked exchanges by number, each with the only sender of its verdict. One without an
/// exchange proves an inner connection: that a worker took it is all its sender tells.
#[derive(Default)]
struct Exchanges {
    last: AtomicU64,
    parked: Mutex<HashMap<u64, Parked>>,
}

type Parked = (Option<Exchange>, Sender<Verdict>);

impl Exchanges {
    fn park(&self, exchange: Option<Exchange>) -> (u64, Receiver<Verdict>) {
        let (sender, receiver) = mpsc::channel();
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        lock(&self.parked).insert(number, (exchange, sender));
        (number, receiver)
    }

    fn take(&self, number: u64) -> Option<Parked> {
        lock(&self.parked).remove(&number)
    }
}

impl Inner {
    fn open(config: &Config, workers: usize, proxy: &Arc<Proxy>) -> io::Result<Inner> {
        let (listener, path, folder) = inner_listener(&config.state_dir)?;
        let exchanges = Arc::new(Exchanges::default());
        let server = tiny_http::Server::from_listener(listener, None).map_err(io::Error::other)?;
        serve(Arc::new(server), workers, &exchanges, proxy)?;
        let (patience, freed) = (config.request_timeout, Condvar::new());
        let inner = Inner {
            path,
            folder,
            exchanges,
            patience,
            idle: Mutex::default(),
            freed,
        };
        for _ in 0..workers {
            let connection = inner.connect()?;
            lock(&inner.idle).push(Some(connection));
        }
        Ok(inner)
    }

    /// Lends the stream to a worker and returns its verdict, or gives the stream back with a
    /// reply when no worker came free, or tiny_http lost the head.
    fn exchange(
        &self,
        stream: Stream,
        head: Head,
        peer: SocketAddr,
    ) -> Result<Verdict, (Box<Stream>, Reply)> {
        let Some(mut permit) = self.permit() else {
            let waited = humantime::format_duration(self.patience);
            let message = format!("all workers were busy for {waited}; raise `workers`, or wait");
            let busy = Reply::new(503, message).retry_after(Duration::from_secs(1));
            return Err((Box::new(stream), busy));
        };
        let text = head.inner();
        let (number, verdict) = self.exchanges.park(Some(Exchange::new(stream, head, peer)));
        let sent = permit.send(number, &text);
        if sent.is_ok()
            && let Ok(verdict) = verdict.recv_timeout(PICKUP_TIME)
        {
            return Ok(verdict);
        }
        // Late, not sent, or broken: if the exchange is gone, a worker has it.
        let Some((Some(exchange), _)) = self.exchanges.take(number) else {
            return Ok(verdict.recv().unwrap_or(Verdict::Broken));
        };
        error!("tiny_http lost a head ({sent:?}); its inner connection is replaced");
        permit.connection = None;
        Err((Box::new(exchange.stream), Reply::internal()))
    }

    fn permit(&self) -> Option<Permit<'_>> {
        let deadline = Instant::now() + self.patience;
        let mut idle = lock(&self.idle);
        loop {
            if let Some(connection) = idle.pop() {
                return Some(Permit {
                    inner: self,
                    connection,
                });
            }
            if left_until(deadline).is_zero() {
                return None;
            }
            idle = wait(&self.freed, idle, left_until(deadline));
        }
    }

    /// Opens an inner connection and proves it: a worker must pick up a head that came over it.
    fn connect(&self) -> io::Result<UnixStream> {
        let mut connection = UnixStream::connect(&self.path)?;
        connection.set_write_timeout(Some(PICKUP_TIME))?;
        let (number, taken) = self.exchanges.park(None);
        write!(
            connection,
            "HEAD / HTTP/1.1\r\n{EXCHANGE}: {number}\r\n\r\n"
        )?;
        let outcome = taken.recv_timeout(PICKUP_TIME);
        self.exchanges.take(number);
        match outcome {
            Err(RecvTimeoutError::Timeout) => Err(io::Error::other("no worker picked a head up")),
            _ => Ok(connection),
        }
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
        let _ = self.folder.as_ref().map(fs::remove_dir);
    }
}

struct Permit<'a> {
    inner: &'a Inner,
    connection: Option<UnixStream>,
}

impl Permit<'_> {
    fn send(&mut self, number: u64, (line, fields): &(String, String)) -> io::Result<()> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.inner.connect()?,
        };
        let head = format!("{line}\r\n{EXCHANGE}: {number}\r\n{fields}\r\n");
        self.connection
            .insert(connection)
            .write_all(head.as_bytes())
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        lock(&self.inner.idle).push(self.connection.take());
        self.inner.freed.notify_one();
    }
}

/// The inner socket: in `state_dir`, or in a private temporary folder where that is read-only or
/// its path too long for a socket address (107 bytes, unix(7)).
fn inner_listener(state_dir: &Path) -> io::Result<(UnixListener, PathBuf, Option<PathBuf>)> {
    let path = state_dir.join("inner.sock");
    let _ = fs::remove_file(&path); // left behind by kill -9; the claim says that it is ours
    if let Ok(listener) = UnixListener::bind(&path) {
        return Ok((listener, path, None));
    }
    let folder = std::env::temp_dir().join(format!("ai-mux-{}", std::process::id()));
    let path = folder.join("inner.sock");
    let _ = fs::remove_file(&path).and_then(|()| fs::remove_dir(&folder));
    DirBuilder::new().mode(0o700).create(&folder)?;
    Ok((UnixListener::bind(&path)?, path, Some(folder)))
}

/// Raises the descriptor limit if it may, and says what it carries: (workers, connections).
fn descriptors(wanted: u64) -> Result<(usize, usize), Error> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let full = SPARE_DESCRIPTORS + wanted * (WORKER_DESCRIPTORS + 1) + SPARE_CONNECTIONS;
    let raised = full.min(maximum.unwrap_or(u64::MAX));
    let mut limit = current.unwrap_or(u64::MAX);
    let rlimit = Rlimit {
        current: Some(raised),
        maximum,
    };
    if limit < raised && setrlimit(Resource::Nofile, rlimit).is_ok() {
        limit = raised;
    }
    let carried = limit.saturating_sub(SPARE_DESCRIPTORS) / (WORKER_DESCRIPTORS + 1);
    let workers = wanted.min(carried);
    if workers == 0 {
        let least = SPARE_DESCRIPTORS + WORKER_DESCRIPTORS + 1;
        return Err(Error::start(
            format!("open files are limited to {limit}"),
            format!("at least {least} are needed"),
        ));
    }
    if workers < wanted {
        warn!("the limit of {limit} open files carries {workers} workers, not {wanted}");
    }
    let rest = limit - SPARE_DESCRIPTORS - workers * WORKER_DESCRIPTORS;
    Ok((
        workers as usize,
        rest.min(workers + SPARE_CONNECTIONS) as usize,
    ))
}

/// All listeners of `listen`: for `:PORT` both families, where one socket does not serve both.
fn listen(address: &str) -> Result<Vec<TcpListener>, Error> {
    let failed = |e| Error::start(format!("listen on {address}"), e);
    let hosts = if address.starts_with(':') {
        vec!["[::]", "0.0.0.0"]
    } else {
        vec![""]
    };
    let (mut listeners, mut port, mut trouble) = (Vec::new(), None, ErrorKind::NotFound.into());
    for host in hosts {
        for mut address in format!("{host}{address}")
            .to_socket_addrs()
            .map_err(failed)?
        {
            address.set_port(port.unwrap_or(address.port()));
            let bound = TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?.port(), listener))
            });
            match bound {
                Ok((number, listener)) => {
                    port = Some(number);
                    listeners.push(listener);
                }
                Err(e) => trouble = e,
            }
        }
    }
    if listeners.is_empty() {
        Err(failed(trouble))
    } else {
        Ok(listeners)
    }
}

/// The certificate in use, exchanged when its files change.
#[derive(Debug)]
struct Renewal(Mutex<Arc<CertifiedKey>>);

impl Renewal {
    fn start(files: &TlsFiles) -> Result<Arc<rustls::ServerConfig>, Error> {
        let mut seen = files.stamps();
        let pair = files
            .load()
            .map_err(|e| Error::config(format!("tls.{e}")))?;
        let renewal = Arc::new(Renewal(Mutex::new(pair)));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::start("TLS", e))?
            .with_no_client_auth()
            .with_cert_resolver(renewal.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let files = files.clone();
        let look = move || loop {
            thread::sleep(RENEWAL_CHECK);
            let now = files.stamps();
            if std::mem::replace(&mut seen, now) != now {
                match files.load() {
                    Ok(pair) => *lock(&renewal.0) = pair,
                    Err(e) => {
                        error!("tls.{e}; the old certificate stays in use");
                        continue;
                    }
                }
                info!(
                    "tls: the new certificate in {} is in use",
                    files.cert.display()
                );
            }
        };
        spawn("renewal", look).map_err(|e| Error::start("start a thread", e))?;
        Ok(Arc::new(config))
    }
}

impl rustls::server::ResolvesServerCert for Renewal {
    fn resolve(&self, _: rustls::server::ClientHello) -> Option<Arc<CertifiedKey>> {
        Some(lock(&self.0).clone())
    }
}

// ─── gate: the head ──────────────────────────────────────────────────────────────────────────
// In: the bytes of one head. Out: its parts, checked (RFC 9112 sections 2 to 6), or a reply.
// What is accepted here, tiny_http reads the same way: no control characters, no bare LF, no
// folding, one length. Stricter than the RFC where a lenient reading could differ from ours.

/// The field that carries an exchange's number inside; no client may send it.
const EXCHANGE: &str = "x-ai-mux-exchange";

#[derive(Debug, Default)]
struct Head {
    method: String,
    /// Origin form, as sent: path and query.
    target: String,
    /// As sent, values trimmed; without the fields that the gate itself acts upon.
    fields: Vec<(String, String)>,
    http10: bool,
    framing: Framing,
    expect: bool,
    websocket: bool,
    /// The client closes after this request, or speaks HTTP/1.0.
    close: bool,
    /// The fields that `Connection` names, lower case: hop-by-hop (RFC 9110 section 7.6.1).
    nominated: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Framing {
    #[default]
    Empty,
    Sized(u64),
    Chunked,
}

/// The length of the head at the start of `bytes`, its empty line included, once it is there.
/// What stands before `from` has been searched already.
fn head_end(bytes: &[u8], from: usize) -> Result<Option<usize>, Reply> {
    let mut start = bytes[..from]
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    for at in from..bytes.len() {
        let fine = match bytes[at] {
            b'\n' => at > 0 && bytes[at - 1] == b'\r',
            byte => {
                matches!(byte, b'\t' | b'\r' | b' '..=b'~') && (at == 0 || bytes[at - 1] != b'\r')
            }
        };
        if !fine {
            return Err(malformed(
                "the head has a byte that is no plain ASCII, or a bare CR or LF",
            ));
        }
        if at - start > LINE_SIZE || at > HEAD_SIZE {
            return Err(head_too_large());
        }
        if bytes[at] == b'\n' {
            if at - start == 1 {
                return Ok(Some(at + 1));
            }
            start = at + 1;
        }
    }
    Ok(None)
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Head, Reply> {
        let mut fields = [httparse::EMPTY_HEADER; FIELD_COUNT];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
            Ok(_) => return Err(malformed("the head has no request line")),
            Err(httparse::Error::TooManyHeaders) => return Err(head_too_large()),
            Err(e) => return Err(malformed(&format!("the head: {e}"))),
        }
        let (method, target) = (request.method.unwrap_or(""), request.path.unwrap_or(""));
        check_request_line(method, target)?;
        let http10 = request.version == Some(0);
        let mut head = Head {
            http10,
            close: http10,
            ..Head::default()
        };
        (head.method, head.target) = (method.to_owned(), target.to_owned());
        let mut hosts = 0;
        for field in request.headers.iter() {
            let value = std::str::from_utf8(field.value).unwrap_or_default(); // ASCII: see head_end
            hosts += usize::from(field.name.eq_ignore_ascii_case("host"));
            head.field(field.name, value.trim_matches([' ', '\t']))?;
        }
        if hosts > 1 || (hosts == 0 && !http10) {
            return Err(malformed("there is not one Host"));
        }
        let bodied = !matches!(head.framing, Framing::Empty | Framing::Sized(0));
        if bodied && head.method == "HEAD" || http10 && head.framing == Framing::Chunked {
            return Err(malformed("a body where none can be"));
        }
        head.expect &= bodied && !http10;
        Ok(head)
    }

    /// Takes one field: to keep, or to act upon.
    fn field(&mut self, name: &str, value: &str) -> Result<(), Reply> {
        let mut items = value.split(',').map(|item| item.trim_matches([' ', '\t']));
        match name.to_ascii_lowercase().as_str() {
            EXCHANGE => return Err(malformed("x-ai-mux-exchange is not for clients")),
            "content-length" | "transfer-encoding" if self.framing != Framing::Empty => {
                return Err(malformed("the body's length is given more than once"));
            }
            "content-length" => {
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(malformed("Content-Length is not a number"));
                }
                self.framing = Framing::Sized(value.parse().unwrap_or(u64::MAX));
            }
            "transfer-encoding" => {
                if !value.eq_ignore_ascii_case("chunked") {
                    return Err(malformed("Transfer-Encoding is not just \"chunked\""));
                }
                self.framing = Framing::Chunked;
            }
            "connection" => {
                self.nominated.extend(items.map(str::to_ascii_lowercase));
                self.close |= self.nominated.iter().any(|name| name == "close");
            }
            "expect" => self.expect |= value.eq_ignore_ascii_case("100-continue"),
            "upgrade" => self.websocket |= items.any(|i| i.eq_ignore_ascii_case("websocket")),
            "host"
                if !value
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-._~:[]%".contains(&b)) =>
            {
                return Err(malformed("Host is not a host"));
            }
            _ => self.fields.push((name.to_owned(), value.to_owned())),
        }
        Ok(())
    }

    fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// The head as tiny_http gets it, written anew from checked parts: the request line, and the
    /// fields, between which its number goes.
    fn inner(&self) -> (String, String) {
        let mut fields = String::new();
        for (name, value) in &self.fields {
            let _ = write!(fields, "{name}: {value}\r\n"); // writing to a String cannot fail
        }
        (format!("{} {} HTTP/1.1", self.method, self.target), fields)
    }
}

fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// A method in capitals, a target in origin form (RFC 9112 section 3).
fn check_request_line(method: &str, target: &str) -> Result<(), Reply> {
    // TRACE would have the upstream send our token back to the client.
    let known = !matches!(method, "TRACE" | "CONNECT") && method.len() <= 32;
    if !known || !method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
        return Err(malformed("the method is not one that can be passed on"));
    }
    if !target.starts_with('/') {
        return Err(malformed(
            "the target is not a path; a whole URL is for other proxies",
        ));
    }
    // What http::Uri takes in a query; '#' would begin a fragment.
    if !target
        .bytes()
        .all(|b| matches!(b, 0x21 | 0x24..=0x3b | 0x3d | 0x3f..=0x7e))
    {
        return Err(malformed(
            "the target has a character that must be percent-encoded",
        ));
    }
    Ok(())
}

// ─── server ──────────────────────────────────────────────────────────────────────────────────
// In: requests from tiny_http. Out: a verdict for each exchange, whatever happens to it, and its
// line in the access log. A panic in the handler ends here: it costs an answer, not a worker.

fn serve(
    server: Arc<tiny_http::Server>,
    workers: usize,
    exchanges: &Arc<Exchanges>,
    proxy: &Arc<Proxy>,
) -> io::Result<()> {
    for _ in 0..workers {
        let (server, exchanges, proxy) = (server.clone(), exchanges.clone(), proxy.clone());
        let work = move || loop {
            match server.recv() {
                Ok(request) => work(request, &exchanges, &proxy),
                Err(e) => error!("tiny_http: {e}"),
            }
        };
        spawn("worker", work)?;
    }
    Ok(())
}

fn work(request: tiny_http::Request, exchanges: &Exchanges, proxy: &Proxy) {
    let number = request
        .headers()
        .first()
        .filter(|h| h.field.equiv(EXCHANGE));
    let number = number.and_then(|h| h.value.as_str().parse().ok());
    if let Some((Some(mut exchange), verdict)) = number.and_then(|n| exchanges.take(n)) {
        let mut access = Access::new(exchange.peer);
        access.started = exchange.started;
        access.method = request.method().as_str().to_owned();
        access.path = path_of(request.url()).to_owned();
        let outcome = fence(&mut access, |access| {
            handle(proxy, &request, &mut exchange, access)
        });
        let last = exchange.head.close || exchange.unread();
        // The gate may be gone with the program; then nobody needs the verdict.
        let _ = verdict.send(conclude(exchange.stream, access, outcome, last));
    }
    drop(request.into_writer());
}

/// Why a request has no answer, or no whole one, from upstream.
enum Fault {
    /// Nothing was sent yet: the client is told.
    Reply(Reply),
    /// The answer had begun, or there is nobody to answer: the reason, for the log.
    Broken(String),
}

impl From<Reply> for Fault {
    fn from(reply: Reply) -> Fault {
        Fault::Reply(reply)
    }
}

/// Turns a panic into a fault: 500 if nothing was sent yet, else a broken answer.
fn fence(
    access: &mut Access,
    work: impl FnOnce(&mut Access) -> Result<(), Fault>,
) -> Result<(), Fault> {
    match catch_unwind(AssertUnwindSafe(|| work(access))) {
        Ok(outcome) => outcome,
        Err(_) if access.status == 0 => Err(Reply::internal().into()),
        Err(_) => Err(Fault::Broken("a fault of ai-mux (panic)".into())),
    }
}

/// Says what is still to be said, writes the log line, and judges what becomes of the stream.
fn conclude(
    mut stream: Stream,
    mut access: Access,
    outcome: Result<(), Fault>,
    mut last: bool,
) -> Verdict {
    let outcome = match outcome {
        Ok(()) => Ok(()),
        Err(Fault::Broken(why)) => Err(why),
        Err(Fault::Reply(reply)) => {
            last |= reply.status == 401;
            access.reply(&reply);
            let bytes = reply.to_bytes(access.method == "HEAD", last);
            stream
                .write_piece(&bytes)
                .map_err(|e| format!("the client went away: {e}"))
        }
    };
    let broken = outcome.is_err();
    access.ended = outcome.err().or(access.ended);
    access.log();
    match (broken, last) {
        (true, _) => Verdict::Broken,
        (_, true) => Verdict::Linger(stream),
        _ => Verdict::Next(stream),
    }
}

// ─── handler ─────────────────────────────────────────────────────────────────────────────────
// In: a request whose head is well-formed, and its exchange. Out: the answer, on the exchange's
// stream, or the fault. The order of the steps is the policy: nobody without a token learns
// which paths exist, and nothing is read or refreshed for a request that is refused anyway.

/// What stays the same while the program runs.
struct Proxy {
    users: Vec<User>,
    upstreams: Vec<Upstream>,
}

fn handle(
    proxy: &Proxy,
    request: &tiny_http::Request,
    exchange: &mut Exchange,
    access: &mut Access,
) -> Result<(), Fault> {
    let fields = request
        .headers()
        .iter()
        .map(|h| (h.field.as_str().as_str(), h.value.as_str()));
    debug!("peer={} request: {}", access.peer, shown(fields));
    access.user = proxy.authenticate(request.headers())?.to_owned();
    let (upstream, url) = proxy.route(request.url())?;
    access.provider = upstream.provider.name;
    if exchange.head.websocket {
        return Err(Reply::new(426, "WebSocket is not served here; use plain HTTP").into());
    }
    if matches!(exchange.head.framing, Framing::Sized(length) if length > BODY_SIZE) {
        return Err(body_too_large().into());
    }
    let token = upstream.credential.token()?;
    let outgoing = upstream.outgoing(request, url, &exchange.head)?;
    let held = exchange.hold()?;
    let whole = !exchange.unread();
    let mut answer = upstream.send(&outgoing, &token, &held, exchange)?;
    if answer.status() == http::StatusCode::UNAUTHORIZED
        && let Some(newer) = upstream.credential.rejected(&token)
        && whole
    {
        answer = upstream.send(&outgoing, &newer, &held, exchange)?;
    }
    drop(held);
    relay(answer, exchange, access)
}

impl Proxy {
    fn new(config: &Config) -> Result<Proxy, Error> {
        let network = Network::new(config)?;
        let upstreams = config.providers()?.into_iter();
        let upstreams = upstreams
            .map(|p| Upstream::new(p, config, &network))
            .collect();
        Ok(Proxy {
            users: config.users.clone(),
            upstreams,
        })
    }

    /// The user's name. All tokens given must be one and the same, and a user's; the comparison
    /// takes as long for a token that is nearly right, and for every user.
    fn authenticate(&self, headers: &[tiny_http::Header]) -> Result<&str, Reply> {
        if self.users.is_empty() {
            // A web page must not use the subscription of whoever looks at it.
            return match headers.iter().any(|h| h.field.equiv("origin")) {
                true => Err(Reply::new(
                    403,
                    "web pages are not served; configure `users`",
                )),
                false => Ok("-"),
            };
        }
        let mut given = headers.iter().filter_map(|header| {
            let value = header.value.as_str();
            match () {
                _ if header.field.equiv("x-api-key") => Some(value),
                _ if header.field.equiv("authorization") => Some(match value.split_once(' ') {
                    Some((bearer, token)) if bearer.eq_ignore_ascii_case("bearer") => token,
                    _ => "",
                }),
                _ => None,
            }
        });
        let wrong = "wrong token: none of those that ai-mux is configured with; check the client";
        let none =
            "no token: send yours as \"Authorization: Bearer TOKEN\" or \"x-api-key: TOKEN\"";
        let token = given
            .next()
            .ok_or_else(|| Reply::new(401, none))?
            .as_bytes();
        let agreed = given.all(|other| other.as_bytes() == token);
        let same = |user: &User| bool::from(user.token.expose().as_bytes().ct_eq(token));
        let found = self
            .users
            .iter()
            .fold(None, |found, user| same(user).then_some(user).or(found));
        let found = found.filter(|_| agreed);
        found
            .map(|user| user.name.as_str())
            .ok_or_else(|| Reply::new(401, wrong))
    }

    /// The upstream for a target, and the URL there. Nothing is decoded, and no segment is
    /// accepted that an upstream could decode to something else.
    fn route(&self, target: &str) -> Result<(&Upstream, String), Reply> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~:@".contains(&b);
        let usual = |s: &&str| !matches!(*s, "" | "." | "..") && s.bytes().all(plain);
        let segments: Vec<_> = path_of(target).split('/').skip(1).collect();
        if segments.iter().all(usual)
            && let [name, "v1", first, ..] = segments[..]
            && !first.eq_ignore_ascii_case("oauth")
            && let Some(upstream) = self.upstreams.iter().find(|u| u.provider.name == name)
        {
            let prefix = if upstream.provider.keeps_v1 {
                "/"
            } else {
                "/v1/"
            };
            let rest = &target[name.len() + prefix.len()..];
            return Ok((upstream, format!("{}{rest}", upstream.base_url)));
        }
        let known = "no such path; /claude/v1/... and /chatgpt/v1/... are, where configured";
        Err(Reply::new(404, known))
    }

    /// Which providers can serve, and nothing secret: JSON.
    fn health(&self) -> String {
        let state = |ready| if ready { "ready" } else { "unavailable" };
        let states = self.upstreams.iter().map(|upstream| {
            let state = state(upstream.credential.is_ready());
            (upstream.provider.name.to_owned(), Value::from(state))
        });
        let states: serde_json::Map<_, _> = states.collect();
        serde_json::json!({ "status": "ok", "providers": states }).to_string()
    }

    fn start_keepers(&self, interval: Duration) -> Result<Vec<JoinHandle<()>>, Error> {
        let keepers = self.upstreams.iter().map(|upstream| {
            let credential = upstream.credential.clone();
            spawn("keeper", move || credential.keep(interval))
        });
        keepers
            .collect::<io::Result<_>>()
            .map_err(|e| Error::start("start a thread", e))
    }

    fn stop_keepers(&self, keepers: Vec<JoinHandle<()>>, deadline: Instant) {
        self.upstreams.iter().for_each(|u| u.credential.stop());
        while keepers.iter().any(|k| !k.is_finished()) {
            if left_until(deadline).is_zero() {
                return error!("a refresh did not end in time; what it brings is lost");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
// ─── credential ──────────────────────────────────────────────────────────────────────────────
// In: a provider's credential file, which its own tools may rewrite at any moment; the token
// endpoint's answers. Out: an access token that is good now, or why there is none. Requests look
// at the file and share the state; only the keeper, one thread a provider, refreshes and writes.
// What cannot happen: two refreshes at once, a token used before it is on disk, a file half
// written, a log-out undone.

struct Credential {
    provider: &'static Provider,
    path: PathBuf,
    token_url: String,
    network: Network,
    state: Mutex<State>,
    /// Wakes the keeper when a request asks, and the requests when the keeper has answered.
    changed: Condvar,
}

/// Requests read it and adopt what is new on disk, the keeper does the rest; both in short
/// locks, with file and network in between.
#[derive(Default)]
struct State {
    token: Option<Token>,
    /// Why there is no token, and what to do.
    lack: String,
    /// Of the file when it was last read; `None` when it must be read again anyhow.
    stamp: Option<Stamp>,
    refresh: Refresh,
    /// Requests take a number here and wait until the keeper has come to it.
    asked: u64,
    answered: u64,
    stopping: bool,
}

/// How refreshing the present login went so far.
#[derive(Default)]
struct Refresh {
    succeeded: Option<Instant>,
    failures: u32,
    /// Why the last one failed, and when to try again: `None` is when the file changes.
    failure: Option<(String, Option<Instant>)>,
    /// The access token that upstream answered with 401.
    rejected: Option<Secret>,
    /// The endpoint's answer that is not on disk yet, after the refresh token that it cost.
    unsaved: Option<(Secret, Value)>,
}

#[derive(Clone, PartialEq)]
struct Token {
    access: Secret,
    refresh: Option<Secret>,
    /// `None` serves until upstream answers 401.
    expires: Option<SystemTime>,
    account: Option<Secret>,
}

impl Token {
    /// Whether it is still good `margin` from now, by the wall clock.
    fn lasts(&self, margin: Duration) -> bool {
        self.expires
            .is_none_or(|expires| expires > SystemTime::now() + margin)
    }
}

impl State {
    /// The refresh token to spend, if the access token does not last `margin`, or was rejected.
    fn due(&self, margin: Duration) -> Option<Secret> {
        let token = self.token.as_ref()?;
        let rejected = self.refresh.rejected.as_ref() == Some(&token.access);
        let wait = self.is_young() || self.is_failing();
        if wait || token.lasts(margin) && !rejected {
            None
        } else {
            token.refresh.clone()
        }
    }

    fn is_young(&self) -> bool {
        self.refresh
            .succeeded
            .is_some_and(|at| at.elapsed() < TOKEN_MARGIN)
    }

    fn is_failing(&self) -> bool {
        matches!(&self.refresh.failure, Some((_, until)) if until.is_none_or(|at| at > Instant::now()))
    }
}

/// A state of a file. Two that are equal hold the same bytes, but for the last `SETTLE_TIME`:
/// device, inode, size, and mtime and ctime in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stamp([u64; 3], [i64; 4]);

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let m = fs::metadata(path).ok()?;
        let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
        Some(Stamp([m.dev(), m.ino(), m.size()], times))
    }

    fn is_settled(&self) -> bool {
        let modified = UNIX_EPOCH + Duration::from_secs(self.1[0].max(0) as u64);
        SystemTime::now()
            .duration_since(modified)
            .is_ok_and(|age| age > SETTLE_TIME)
    }
}

/// Why a credential file gives no token.
enum Lack {
    /// There is no login, or none that is ours to use.
    LoggedOut(String),
    /// It is half-written, or being written.
    Unfinished(String),
}

/// For requests.
impl Credential {
    /// An access token to use now. Waits for a refresh only when there is none that is good.
    fn token(&self) -> Result<Token, Reply> {
        let mut state = self.look(false);
        // Expired: all wait. Ageing: one does, while the others use what is still good.
        let idle = state.asked == state.answered;
        let margin = if idle { TOKEN_MARGIN } else { Duration::ZERO };
        if state.due(margin).is_some() {
            state = self.ask(state);
        }
        let dead = |why: &str| Reply::new(503, format!("ai-mux has no login to use: {why}"));
        let token = state.token.clone().ok_or_else(|| dead(&state.lack))?;
        match &state.refresh.failure {
            Some((why, None)) => return Err(dead(why)),
            _ if token.lasts(Duration::ZERO) || state.is_young() => {}
            Some((why, Some(until))) => {
                let wait = left_until(*until) + Duration::from_secs(1);
                let message =
                    format!("the login could not be refreshed: {why}; wait and try again");
                return Err(Reply::new(503, message).retry_after(wait));
            }
            None => return Err(dead(&format!("it has expired; {}", self.remedy()))),
        }
        Ok(token)
    }

    /// Upstream answered 401 to this token: a newer one, from disk or from a refresh, if any.
    fn rejected(&self, token: &Token) -> Option<Token> {
        let newer = |s: &State| s.token.clone().filter(|t| t.access != token.access);
        let mut state = self.look(true);
        if newer(&state).is_none() {
            state.refresh.rejected = Some(token.access.clone());
            state = self.ask(state);
        }
        newer(&state)
    }

    /// Has the keeper do its round, and waits for the end of one that began after this call.
    fn ask<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.asked += 1;
        let number = state.asked;
        self.changed.notify_all();
        while state.answered < number && !state.stopping {
            state = wait(&self.changed, state, TOKEN_TIME);
        }
        state
    }

    fn is_ready(&self) -> bool {
        let state = self.look(false);
        let dead = matches!(state.refresh.failure, Some((_, None)));
        let usable = |t: &Token| t.refresh.is_some() || t.lasts(Duration::ZERO);
        !dead && state.token.as_ref().is_some_and(usable)
    }

    /// Adopts what is new on disk. `anyway` reads the file even if it seems unchanged. Small and
    /// local, it is read under the lock: whoever waits for that would have to read it as well.
    fn look(&self, anyway: bool) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        if anyway || state.stamp.is_none() || state.stamp != Stamp::of(&self.path) {
            let (stamp, reading) = self.read();
            self.adopt(&mut state, stamp, reading);
        }
        state
    }

    fn adopt(&self, state: &mut State, stamp: Option<Stamp>, reading: Result<Token, Lack>) {
        let name = self.provider.name;
        state.stamp = stamp.filter(Stamp::is_settled);
        let (token, lack) = match reading {
            Ok(token) => (Some(token), String::new()),
            Err(Lack::Unfinished(_)) if state.token.is_some() => return,
            Err(Lack::Unfinished(why) | Lack::LoggedOut(why)) => (None, why),
        };
        let refresh = token.as_ref().and_then(|token| token.refresh.as_ref());
        let spent = state
            .refresh
            .unsaved
            .as_ref()
            .is_some_and(|(spent, _)| refresh == Some(spent));
        if spent || token == state.token && lack == state.lack {
            return;
        }
        match token {
            Some(_) => info!("{name}: login read from {}", self.path.display()),
            None => warn!("{name}: {lack}"),
        }
        (state.token, state.lack, state.refresh) = (token, lack, Refresh::default());
    }

    /// Reads the file, and the stamp of what was read: the same before and after.
    fn read(&self) -> (Option<Stamp>, Result<Token, Lack>) {
        let name = self.path.display();
        for _ in 0..3 {
            let bytes = self.open();
            let stamp = Stamp::of(&self.path);
            let reading = bytes.map_err(Lack::LoggedOut).and_then(|(before, bytes)| {
                if Some(before) != stamp {
                    return Err(Lack::Unfinished(format!("{name} keeps changing")));
                }
                let json = serde_json::from_slice(&bytes).map_err(|_| {
                    let remedy = self.remedy();
                    Lack::Unfinished(format!(
                        "{name} is not whole JSON; if it stays so, {remedy}"
                    ))
                })?;
                let none = || Lack::LoggedOut(format!("{name} holds no login; {}", self.remedy()));
                self.provider.token_in(&json).ok_or_else(none)
            });
            if !matches!(reading, Err(Lack::Unfinished(_))) {
                return (stamp, reading);
            }
        }
        let why = format!(
            "{name} is not whole JSON; if it stays so, {}",
            self.remedy()
        );
        (None, Err(Lack::Unfinished(why)))
    }

    /// The bytes of the file, if it is ours to use; else why not, and what to do.
    fn open(&self) -> Result<(Stamp, Vec<u8>), String> {
        let name = self.path.display();
        let user = rustix::process::geteuid().as_raw();
        let failed = |e: io::Error| match e.kind() {
            ErrorKind::NotFound => format!("{name} is not there; {}", self.remedy()),
            _ => format!("read {name}: {e}; make it readable for user {user}"),
        };
        let meta = fs::metadata(&self.path).map_err(failed)?;
        if meta.uid() != user {
            let owner = meta.uid();
            let folder = self.path.parent().unwrap_or(&self.path).display();
            return Err(format!(
                "{name} belongs to user {owner}; make it and its folder ai-mux's: chown -R {user} {folder}"
            ));
        }
        if !meta.is_file() || meta.len() > FILE_SIZE {
            return Err(format!(
                "{name} is not a credential file; {}",
                self.remedy()
            ));
        }
        if meta.mode() & 0o077 != 0 {
            let outcome = fs::set_permissions(&self.path, fs::Permissions::from_mode(0o600));
            warn!(
                "{name}: others may read it (mode {:o}); chmod 600: {outcome:?}",
                meta.mode()
            );
        }
        let before = Stamp::of(&self.path).ok_or_else(|| failed(ErrorKind::NotFound.into()))?;
        let mut bytes = Vec::new();
        let file = File::open(&self.path).map_err(failed)?;
        file.take(FILE_SIZE)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Ok((before, bytes))
    }

    /// What the owner does about a login that is missing or dead.
    fn remedy(&self) -> String {
        let folder = self.path.parent().unwrap_or(&self.path).display();
        format!(
            "log in with: {}={folder} {}",
            self.provider.home, self.provider.login
        )
    }
}

/// For the keeper.
impl Credential {
    fn keep(&self, interval: Duration) {
        loop {
            let number = lock(&self.state).asked;
            let _ = catch_unwind(AssertUnwindSafe(|| self.round(interval)));
            let next = Instant::now() + interval;
            let mut state = lock(&self.state);
            (state.answered, state.refresh.rejected) = (number, None);
            self.changed.notify_all();
            while state.asked == state.answered && !state.stopping {
                let retry = state.refresh.failure.as_ref().and_then(|(_, until)| *until);
                let time = left_until(retry.map_or(next, |retry| retry.min(next)));
                if time.is_zero() {
                    break;
                }
                state = wait(&self.changed, state, time);
            }
            if state.stopping {
                drop(state);
                return self.save_again();
            }
        }
    }

    fn stop(&self) {
        lock(&self.state).stopping = true;
        self.changed.notify_all();
    }

    /// One look at the login, and a refresh if it ends before a minute after the next look.
    fn round(&self, interval: Duration) {
        self.save_again();
        if self.look(false).due(interval + TOKEN_MARGIN).is_none() {
            return;
        }
        let due = self.look(true).due(interval + TOKEN_MARGIN);
        let Some(spent) = due else { return };
        if let Err((why, least)) = self.refresh(&spent) {
            // Another tool may have refreshed meanwhile; then its login is the newer one.
            let mut state = self.look(true);
            let token = state.token.as_ref();
            if token.is_some_and(|token| token.refresh.as_ref() == Some(&spent)) {
                self.fail(&mut state.refresh, why, least);
            }
        }
    }

    /// Notes a failure: for `least` or the back-off, whichever is longer, or until the file changes.
    fn fail(&self, refresh: &mut Refresh, why: String, least: Option<Duration>) {
        let (name, remedy) = (self.provider.name, self.remedy());
        let Some(least) = least else {
            error!("{name}: refresh: {why}; it is down until there is a new login; {remedy}");
            refresh.failure = Some((format!("{why}; {remedy}"), None));
            return;
        };
        let backoff = BACKOFF_MIN * 2u32.pow(refresh.failures.min(6));
        let time = backoff.min(BACKOFF_MAX).max(least).min(RETRY_AFTER_MAX);
        warn!("{name}: refresh: {why}; next try in {}s", time.as_secs());
        refresh.failures += 1;
        refresh.failure = Some((why, Some(Instant::now() + time)));
    }

    /// Spends a refresh token, but first finds out what could keep its yield from being saved.
    fn refresh(&self, spent: &Secret) -> Result<(), (String, Option<Duration>)> {
        let name = self.provider.name;
        if lock(&self.state).refresh.unsaved.is_some() {
            return Err((
                "the last one is not on disk yet".into(),
                Some(Duration::ZERO),
            ));
        }
        let draft = Draft::new(&self.path).map_err(|why| {
            error!("{name}: {why}; no token was spent");
            (why, Some(Duration::ZERO))
        })?;
        let answer = self.call(spent)?;
        lock(&self.state).refresh.unsaved = Some((spent.clone(), answer));
        self.save(Ok(draft));
        info!("{name}: refreshed");
        Ok(())
    }

    /// Asks the token endpoint. Of its answer, nothing but the `error` word is ever shown. The
    /// error: why, and how long to wait at least; `None` is for ever.
    fn call(&self, spent: &Secret) -> Result<Value, (String, Option<Duration>)> {
        let (provider, url) = (self.provider, &self.token_url);
        let passing = |e: &dyn Display| (format!("{url}: {e}"), Some(Duration::ZERO));
        let mut form =
            serde_json::json!({ "grant_type": "refresh_token", "client_id": provider.client_id });
        form["refresh_token"] = spent.expose().into();
        if let Some(scope) = provider.scope {
            form["scope"] = scope.into();
        }
        let agent = self
            .network
            .agent(url, |config| config.timeout_global(Some(TOKEN_TIME)));
        let request = agent.post(url).header("content-type", "application/json");
        let mut answer = request.send(form.to_string()).map_err(|e| passing(&e))?;
        let (status, wait) = (answer.status().as_u16(), retry_after(answer.headers()));
        let text = answer
            .body_mut()
            .with_config()
            .limit(TOKEN_SIZE)
            .read_to_vec();
        let text = text.map_err(|e| passing(&e))?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        match status {
            200 if secret_in(&json, "access_token").is_some() => Ok(json),
            200 => Err(passing(&"the answer holds no token")),
            _ => {
                let word = error_word(&json);
                let last = provider.is_final(status, word);
                let wait = if last {
                    None
                } else {
                    Some(wait.unwrap_or_default())
                };
                Err((format!("{url} answered {status} {word}"), wait))
            }
        }
    }

    /// Tries again to write what could not be written.
    fn save_again(&self) {
        if lock(&self.state).refresh.unsaved.is_some() {
            self.save(Draft::new(&self.path));
        }
    }

    /// Puts a refresh's yield on disk, then into use; or only into use, if that fails.
    fn save(&self, draft: Result<Draft, String>) {
        let unsaved = lock(&self.state).refresh.unsaved.clone();
        let Some((spent, answer)) = unsaved else {
            return;
        };
        let saved = draft.and_then(|draft| self.write(&spent, &answer, draft));
        let mut state = self.look(saved.is_ok());
        if let Err(why) = saved
            && let Some(token) = &mut state.token
        {
            let name = self.provider.name;
            error!("{name}: {why}; the new login is in memory only, and will be written again");
            self.provider.renew(token, &answer);
            let unsaved = Some((spent, answer));
            state.refresh = Refresh {
                unsaved,
                ..Refresh::default()
            };
        }
        state.refresh.succeeded = Some(Instant::now());
    }

    /// Writes an answer into the file, unless that has a newer login: then the file wins.
    fn write(&self, spent: &Secret, answer: &Value, draft: Draft) -> Result<(), String> {
        let failed = |e: &dyn Display| format!("write {}: {e}", self.path.display());
        let (_, bytes) = self.open()?;
        let mut json = serde_json::from_slice(&bytes).map_err(|e| failed(&e))?;
        let on_disk = self
            .provider
            .token_in(&json)
            .and_then(|token| token.refresh);
        if on_disk.as_ref() == Some(spent) {
            self.provider.edit(&mut json, answer);
            let text = serde_json::to_vec_pretty(&json).map_err(|e| failed(&e))?;
            draft.publish(&text).map_err(|e| failed(&e))?;
        }
        lock(&self.state).refresh.unsaved = None;
        Ok(())
    }
}

/// A file that will replace another whole: written beside it, synced, renamed over it.
struct Draft {
    target: PathBuf,
    path: PathBuf,
    file: File,
}

impl Draft {
    /// Proves that the folder can be written and has room, before anything depends on it.
    fn new(path: &Path) -> Result<Draft, String> {
        let name = path.display();
        let failed = |e| format!("{name} cannot be replaced: {e}; let ai-mux write to its folder");
        let target = path.canonicalize().map_err(failed)?;
        // proc_pid_mountinfo(5): the fifth field is the mount point, with spaces escaped.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let escaped = target.display().to_string().replace(' ', "\\040");
        if mounts
            .lines()
            .any(|line| line.split(' ').nth(4) == Some(&escaped))
        {
            return Err(format!(
                "{name} is a mount by itself and cannot be replaced; mount its folder"
            ));
        }
        let mut beside = target.clone().into_os_string();
        beside.push(".ai-mux-new");
        let path = PathBuf::from(beside);
        let _ = fs::remove_file(&path);
        let size = fs::metadata(&target).map_err(failed)?.len() + TOKEN_SIZE;
        let options = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let mut draft = Draft {
            file: options.map_err(failed)?,
            target,
            path,
        };
        io::copy(&mut io::repeat(b' ').take(size), &mut draft.file).map_err(failed)?;
        draft.file.sync_all().map_err(failed)?;
        Ok(draft)
    }

    fn publish(self, text: &[u8]) -> io::Result<()> {
        self.file.write_all_at(text, 0)?;
        self.file.set_len(text.len() as u64)?;
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        File::open(self.target.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // gone already, once published
    }
}

fn secret_in(json: &Value, key: &str) -> Option<Secret> {
    json.get(key).and_then(Value::as_str).and_then(Secret::new)
}

/// The `error` word of a token endpoint's answer (RFC 6749 section 5.2; OpenAI nests it), or ""
/// if it is nothing that looks like one.
fn error_word(json: &Value) -> &str {
    let error = json.get("error").unwrap_or(json);
    let word = error.get("code").or(error.get("type")).unwrap_or(error);
    let word = word.as_str().filter(|w| w.len() <= 64).unwrap_or_default();
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if word.bytes().all(plain) { word } else { "" }
}

/// The claims of an access token that is a JWT (RFC 7519). It is ours, from a source that we
/// trust, so its signature is not checked.
fn claims(token: &Secret) -> Value {
    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
    let payload = token.expose().split('.').nth(1).unwrap_or_default();
    let bytes = BASE64_URL_SAFE_NO_PAD
        .decode(payload.trim_end_matches('='))
        .unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// A time as credential files have it: milliseconds above 10¹¹, else seconds.
fn time(value: &Value) -> Option<SystemTime> {
    let number = value.as_f64()?.clamp(0.0, 1e14);
    let seconds = if number > 1e11 {
        number / 1000.0
    } else {
        number
    };
    Some(UNIX_EPOCH + Duration::from_secs_f64(seconds))
}

/// When a new access token ends, by `expires_in` or its own claim.
fn expiry(answer: &Value) -> Option<SystemTime> {
    let seconds = answer.get("expires_in").and_then(Value::as_f64);
    let seconds = seconds.map(|s| Duration::from_secs_f64(s.clamp(LIFETIME_MIN, LIFETIME_MAX)));
    let claim = || time(claims(&secret_in(answer, "access_token")?).get("exp")?);
    seconds.map(|s| SystemTime::now() + s).or_else(claim)
}

/// `Retry-After` in either form (RFC 9110 section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("retry-after")?.to_str().ok()?.trim();
    let date = || {
        httpdate::parse_http_date(text)
            .ok()?
            .duration_since(SystemTime::now())
            .ok()
    };
    text.parse().ok().map(Duration::from_secs).or_else(date)
}

// ─── upstream ────────────────────────────────────────────────────────────────────────────────
// In: a checked request and a token. Out: the upstream's answer, head read and body not. The
// header policy stands here: strip what is the client's own, set what is ours last.

/// All that differs between the two vendors.
struct Provider {
    name: &'static str,
    base_url: &'static str,
    token_url: &'static str,
    /// The path to upstream begins with `/v1`, as the client's does.
    keeps_v1: bool,
    /// Added to `anthropic-beta`; without it, `anthropic-*` is dropped.
    beta: Option<&'static str>,
    client_id: &'static str,
    scope: Option<&'static str>,
    /// The error words that end a login, with status 400 or 401; `None`: any 4xx but 408, 429.
    final_words: Option<&'static [&'static str]>,
    file: &'static str,
    /// The file's object that holds the tokens (else the file itself does), and its keys for
    /// access token, refresh token and expiry.
    object: &'static str,
    keys: [&'static str; 3],
    /// The variable that tells the vendor's tool its folder, and the command that logs in.
    home: &'static str,
    login: &'static str,
}

/// Addresses, client ids, file names and error words of the vendors' own tools, Claude Code and
/// Codex, as of November 2026.
static PROVIDERS: [Provider; 2] = [
    Provider {
        name: "claude",
        base_url: "https://api.anthropic.com",
        token_url: "https://platform.claude.com/v1/oauth/token",
        keeps_v1: true,
        beta: Some("oauth-2025-04-20"),
        client_id: "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        scope: None,
        final_words: None,
        file: ".credentials.json",
        object: "claudeAiOauth",
        keys: ["accessToken", "refreshToken", "expiresAt"],
        home: "CLAUDE_CONFIG_DIR",
        login: "claude /login",
    },
    Provider {
        name: "chatgpt",
        base_url: "https://chatgpt.com/backend-api/codex",
        token_url: "https://auth.openai.com/oauth/token",
        keeps_v1: false,
        beta: None,
        client_id: "app_EMoamEEZ73f0CkXaXp7hrann",
        scope: Some("openid profile email"),
        final_words: Some(&[
            "invalid_grant",
            "refresh_token_expired",
            "refresh_token_reused",
            "refresh_token_invalidated",
        ]),
        file: "auth.json",
        object: "tokens",
        keys: ["access_token", "refresh_token", "expires_at"],
        home: "CODEX_HOME",
        login: "codex login",
    },
];

impl Provider {
    fn path(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(self.name).join(self.file)
    }

    fn is_final(&self, status: u16, word: &str) -> bool {
        match self.final_words {
            Some(words) => matches!(status, 400 | 401) && words.contains(&word),
            None => matches!(status, 400..500) && !matches!(status, 408 | 429),
        }
    }

    fn token_in(&self, json: &Value) -> Option<Token> {
        let [access, refresh, expires] = self.keys;
        let object = json
            .get(self.object)
            .filter(|o| o.is_object())
            .unwrap_or(json);
        let access = secret_in(object, access)?;
        let claims = claims(&access);
        let expires = object
            .get(expires)
            .and_then(time)
            .or(claims.get("exp").and_then(time));
        let claimed = claims
            .get("https://api.openai.com/auth")
            .unwrap_or(&Value::Null);
        let account = secret_in(object, "account_id");
        let account = account.or_else(|| secret_in(claimed, "chatgpt_account_id"));
        Some(Token {
            access,
            refresh: secret_in(object, refresh),
            expires,
            account,
        })
    }

    /// A token in memory, renewed by an endpoint's answer.
    fn renew(&self, token: &mut Token, answer: &Value) {
        token.access = secret_in(answer, "access_token").unwrap_or_else(|| token.access.clone());
        token.refresh = secret_in(answer, "refresh_token").or(token.refresh.take());
        token.expires = expiry(answer);
    }

    /// Writes an endpoint's answer into the parsed file; all else stays.
    fn edit(&self, json: &mut Value, answer: &Value) {
        let now = SystemTime::now();
        if let Some(last) = json.get_mut("last_refresh") {
            *last = humantime::format_rfc3339_micros(now).to_string().into();
        }
        let inside = json.get(self.object).is_some_and(Value::is_object);
        let object = if inside { &mut json[self.object] } else { json };
        let [access, refresh, expires] = self.keys;
        for (key, new) in [
            (access, "access_token"),
            (refresh, "refresh_token"),
            ("id_token", "id_token"),
        ] {
            if let (Some(old), Some(new)) = (object.get_mut(key), secret_in(answer, new)) {
                *old = new.expose().into();
            }
        }
        if let Some(old) = object.get_mut(expires) {
            // Tools that share the file need a time: an hour, where nobody told one.
            let at = expiry(answer).unwrap_or(now + Duration::from_secs(3600));
            let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            let seconds = old.as_f64().is_some_and(|old| old <= 1e11);
            let number = if seconds {
                since.as_secs()
            } else {
                since.as_millis() as u64
            };
            *old = number.into();
        }
    }
}

/// How upstreams are reached; for requests and refreshes alike.
#[derive(Clone)]
struct Network {
    proxy: Option<ureq::Proxy>,
    roots: ureq::tls::RootCerts,
}

type AgentConfig = ureq::config::ConfigBuilder<ureq::typestate::AgentScope>;

impl Network {
    fn new(config: &Config) -> Result<Network, Error> {
        let names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
        let set = |name: &&&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let mut proxy = config.proxy.clone();
        if let (None, Some(name)) = (&proxy, names.iter().find(set)) {
            let wrong = || Error::start(format!("{name} (not shown)"), "expected a proxy's URL");
            proxy = Some(ureq::Proxy::try_from_env().ok_or_else(wrong)?);
        }
        let file = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty());
        let Some(file) = file else {
            return Ok(Network {
                proxy,
                roots: ureq::tls::RootCerts::WebPki,
            });
        };
        let failed = |e: &dyn Display| Error::start(format!("SSL_CERT_FILE {}", file.display()), e);
        let pem = fs::read(&file).map_err(|e| failed(&e))?;
        let certificates = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
            Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let certificates: Vec<_> = certificates.collect();
        if certificates.is_empty() {
            return Err(failed(&"no certificate in it; expected a PEM bundle"));
        }
        Ok(Network {
            proxy,
            roots: ureq::tls::RootCerts::from(certificates),
        })
    }

    /// A ureq agent with everything automatic off.
    fn agent(&self, url: &str, limits: impl Fn(AgentConfig) -> AgentConfig) -> ureq::Agent {
        let loopback = url.parse().is_ok_and(|uri| is_loopback(&uri));
        let tls = ureq::tls::TlsConfig::builder().root_certs(self.roots.clone());
        let config = ureq::Agent::config_builder()
            .tls_config(tls.build())
            .proxy(self.proxy.clone().filter(|_| !loopback))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept("")
            .accept_encoding("")
            .user_agent("")
            .allow_non_standard_methods(true)
            .input_buffer_size(UPSTREAM_INPUT)
            .output_buffer_size(UPSTREAM_OUTPUT)
            .max_response_header_size(UPSTREAM_INPUT - 1)
            .max_idle_age(UPSTREAM_IDLE);
        limits(config).build().new_agent()
    }
}

/// The host of a URL, where it is an address and needs no resolver.
fn address_of(uri: &http::Uri) -> Option<IpAddr> {
    uri.host()?.trim_matches(['[', ']']).parse().ok()
}

fn is_loopback(uri: &http::Uri) -> bool {
    uri.host() == Some("localhost") || address_of(uri).is_some_and(|ip| ip.is_loopback())
}

struct Upstream {
    provider: &'static Provider,
    base_url: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    agent: ureq::Agent,
    credential: Arc<Credential>,
    request_timeout: Duration,
}

/// A request to upstream but for its token and body.
struct Outgoing {
    method: http::Method,
    url: String,
    headers: HeaderMap,
}

impl Upstream {
    fn new(settings: ProviderSettings, config: &Config, network: &Network) -> Upstream {
        let ProviderSettings {
            provider,
            headers,
            base_url,
            token_url,
        } = settings;
        let time = Some(config.request_timeout);
        // An address needs no resolver, whose time limit costs a thread a request.
        let named = base_url.parse().is_ok_and(|uri| address_of(&uri).is_none());
        let agent = network.agent(&base_url, |agent| {
            agent
                .timeout_resolve(time.filter(|_| named))
                .timeout_connect(time)
                .timeout_send_request(time)
                .timeout_per_write(time)
                .timeout_recv_response(time)
                .timeout_per_read(Some(config.stream_idle_timeout))
                .max_idle_connections(config.workers)
                .max_idle_connections_per_host(config.workers)
        });
        let path = provider.path(&config.state_dir);
        let (network, state, changed) = (network.clone(), Mutex::default(), Condvar::new());
        let credential = Credential {
            provider,
            path,
            token_url,
            network,
            state,
            changed,
        };
        let credential = Arc::new(credential);
        let request_timeout = config.request_timeout;
        Upstream {
            provider,
            base_url,
            headers,
            agent,
            credential,
            request_timeout,
        }
    }

    /// The header policy.
    fn outgoing(
        &self,
        request: &tiny_http::Request,
        url: String,
        head: &Head,
    ) -> Result<Outgoing, Reply> {
        let wrong = || malformed("it cannot be passed on");
        let mut headers = HeaderMap::new();
        for header in request.headers() {
            let name = header.field.as_str().as_str().to_ascii_lowercase();
            if !self.is_dropped(&name) && !head.nominated.contains(&name) {
                let name = HeaderName::try_from(name).map_err(|_| wrong())?;
                let value = HeaderValue::from_str(header.value.as_str()).map_err(|_| wrong())?;
                headers.append(name, value);
            }
        }
        for (name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        if let Some(ours) = self.provider.beta {
            let values = headers.get_all("anthropic-beta").iter();
            let merged = merged_beta(values.filter_map(|v| v.to_str().ok()), ours);
            headers.insert(
                "anthropic-beta",
                HeaderValue::try_from(merged).map_err(|_| wrong())?,
            );
        }
        let method = http::Method::from_bytes(request.method().as_str().as_bytes());
        let method = method.map_err(|_| wrong())?;
        match head.framing {
            Framing::Sized(length) => drop(headers.insert(CONTENT_LENGTH, length.into())),
            Framing::Chunked => {
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            // Without it ureq would send these chunked (RFC 9110 section 8.6 wants it anyway).
            Framing::Empty if matches!(method.as_str(), "POST" | "PUT" | "PATCH") => {
                headers.insert(CONTENT_LENGTH, 0.into());
            }
            Framing::Empty => {}
        }
        Ok(Outgoing {
            method,
            url,
            headers,
        })
    }

    /// What is the client's own: its secrets, what holds for its connection only, and what would
    /// tell upstream about it.
    fn is_dropped(&self, name: &str) -> bool {
        is_reserved(name)
            || matches!(name, EXCHANGE | "forwarded" | "x-real-ip")
            || name.starts_with("x-forwarded-")
            || self.provider.beta.is_none() && name.starts_with("anthropic-")
    }

    fn send(
        &self,
        outgoing: &Outgoing,
        token: &Token,
        held: &[u8],
        exchange: &mut Exchange,
    ) -> Result<http::Response<ureq::Body>, Fault> {
        let internal = |_| Fault::from(Reply::internal()); // a Secret fits a header
        let mut headers = outgoing.headers.clone();
        let bearer = format!("Bearer {}", token.access.expose());
        headers.insert(
            AUTHORIZATION,
            HeaderValue::try_from(bearer).map_err(internal)?,
        );
        if let Some(account) = token
            .account
            .as_ref()
            .filter(|_| self.provider.beta.is_none())
        {
            let account = HeaderValue::try_from(account.expose()).map_err(internal)?;
            headers.insert("chatgpt-account-id", account);
        }
        headers
            .iter_mut()
            .for_each(|(_, value)| value.set_sensitive(true));
        let bodied = [CONTENT_LENGTH, TRANSFER_ENCODING]
            .iter()
            .any(|n| headers.contains_key(n));
        let request = http::Request::builder()
            .method(&outgoing.method)
            .uri(&outgoing.url);
        let mut request = request
            .body(())
            .map_err(|_| malformed("the target is not a URL"))?;
        *request.headers_mut() = headers;
        let mut body = held.chain(&mut *exchange);
        let answer = match bodied {
            true => self
                .agent
                .run(request.map(|()| ureq::SendBody::from_reader(&mut body))),
            false => self.agent.run(request),
        };
        let (name, limit) = (
            self.provider.name,
            humantime::format_duration(self.request_timeout),
        );
        answer.map_err(|e| match (exchange.fault.take(), e) {
            (Some(fault), _) => fault,
            (None, ureq::Error::Timeout(_)) => {
                let message = format!("{name} did not answer within request_timeout, {limit}");
                Reply::new(504, message).into()
            }
            (None, e) => {
                Reply::new(502, format!("{name} cannot be reached, or broke off: {e}")).into()
            }
        })
    }
}

/// Headers that neither a client nor a configuration may send upstream: authentication, account,
/// framing, `host`, hop-by-hop.
fn is_reserved(name: &str) -> bool {
    is_hop_by_hop(name)
        || matches!(
            name,
            "authorization" | "x-api-key" | "cookie" | "chatgpt-account-id"
        )
        || matches!(name, "host" | "expect" | "content-length")
}

/// RFC 9110 section 7.6.1, and what proxies say to each other.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection" | "keep-alive" | "te" | "trailer" | "transfer-encoding" | "upgrade"
    ) || name.starts_with("proxy-")
}

/// The values of `anthropic-beta` in their order, with ours once.
fn merged_beta<'a>(values: impl Iterator<Item = &'a str>, ours: &'a str) -> String {
    let mut merged: Vec<&str> = Vec::new();
    for item in values.flat_map(|value| value.split(',')).chain([ours]) {
        let item = item.trim();
        if !item.is_empty() && (item != ours || !merged.contains(&ours)) {
            merged.push(item);
        }
    }
    merged.join(",")
}

// ─── stream ──────────────────────────────────────────────────────────────────────────────────
// In: a client's bytes. Out: heads, decoded bodies; and to the client, answers, piece by piece.
// One rule bounds all of it: a socket knows an instant until which the present step must be done.

struct Socket {
    tcp: Arc<TcpStream>,
    /// When the present step ends in `TimedOut`.
    until: Instant,
    /// What the kernel was last told of it, for reads and for writes.
    told: [Duration; 2],
}

impl Socket {
    /// Does one read or write. The kernel is told of the time left only when that has changed
    /// much; it may be told less, as every wait is followed by another look at the clock.
    fn step<T>(
        &mut self,
        write: bool,
        mut go: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let left = left_until(self.until);
            if left < Duration::from_millis(1) {
                return Err(ErrorKind::TimedOut.into());
            }
            let told = &mut self.told[usize::from(write)];
            if *told < left / 2 || *told > left + Duration::from_millis(100) {
                *told = left;
                match write {
                    true => self.tcp.set_write_timeout(Some(left))?,
                    false => self.tcp.set_read_timeout(Some(left))?,
                }
            }
            match go(&self.tcp) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                outcome => return outcome,
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.step(false, |mut tcp| tcp.read(out))
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.step(true, |mut tcp| tcp.write(bytes))
    }

    fn write_vectored(&mut self, parts: &[IoSlice]) -> io::Result<usize> {
        self.step(true, |mut tcp| tcp.write_vectored(parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Stream {
    socket: Socket,
    tls: Option<Box<rustls::ServerConnection>>,
    /// Read from the client but not used yet: it travels with the stream.
    ahead: Vec<u8>,
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.ahead.is_empty() {
            return match &mut self.tls {
                Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(out),
                None => self.socket.read(out),
            };
        }
        let count = self.ahead.as_slice().read(out)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.ahead.is_empty() {
            self.fill()?;
        }
        Ok(&self.ahead)
    }

    fn consume(&mut self, count: usize) {
        self.ahead.drain(..count);
        if self.ahead.is_empty() {
            self.ahead = Vec::new(); // an idle connection holds no buffer
        }
    }
}

impl Stream {
    fn new(tcp: Arc<TcpStream>) -> Stream {
        let socket = Socket {
            tcp,
            until: Instant::now(),
            told: [Duration::ZERO; 2],
        };
        Stream {
            socket,
            tls: None,
            ahead: Vec::new(),
        }
    }

    fn handshake(&mut self, config: Arc<rustls::ServerConfig>) -> io::Result<()> {
        self.socket.until = Instant::now() + HEAD_TIME;
        let mut tls = rustls::ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut self.socket)?;
        }
        self.tls = Some(Box::new(tls));
        Ok(())
    }

    /// Takes in what has come, at the end of what was read ahead.
    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 4096];
        let ahead = std::mem::take(&mut self.ahead);
        let count = self.read(&mut chunk);
        self.ahead = ahead;
        self.ahead
            .extend_from_slice(&chunk[..*count.as_ref().unwrap_or(&0)]);
        count
    }

    /// The next head; `None` when the client has nothing more to say.
    fn read_head(&mut self) -> Result<Option<Head>, Reply> {
        let (mut searched, mut begun) = (0, !self.ahead.is_empty());
        self.socket.until = Instant::now() + if begun { HEAD_TIME } else { IDLE_TIME };
        loop {
            // One empty line before a request is nothing (RFC 9112 section 2.2).
            if searched < 2 && self.ahead.starts_with(b"\r\n") {
                self.consume(2);
                searched = 0;
            }
            if let Some(length) = head_end(&self.ahead, searched)? {
                let head = Head::parse(&self.ahead[..length])?;
                self.consume(length);
                return Ok(Some(head));
            }
            searched = self.ahead.len();
            match self.fill() {
                Ok(0) => return Ok(None),
                Ok(_) if begun => {}
                Ok(_) => {
                    begun = true;
                    self.socket.until = Instant::now() + HEAD_TIME;
                }
                Err(e) if e.kind() == ErrorKind::TimedOut && begun => {
                    return Err(Reply::new(
                        408,
                        "the head did not come in time; send it at once",
                    ));
                }
                Err(_) => return Ok(None),
            }
        }
    }

    fn write_piece(&mut self, piece: &[u8]) -> io::Result<()> {
        self.socket.until = Instant::now() + PIECE_TIME;
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).write_all(piece),
            None => self.socket.write_all(piece),
        }
    }

    /// The end of a connection whose answer must still be read: a client that is sending sees a
    /// reset, and not the answer, if it is closed at once (RFC 9112 section 9.6).
    fn linger(mut self) {
        self.socket.until = Instant::now() + LINGER_TIME;
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut self.socket).is_ok() {}
        }
        let _ = self.socket.tcp.shutdown(Shutdown::Write);
        let (mut drained, mut chunk) = (0, [0; 4096]);
        while drained < LINGER_SIZE {
            match self.socket.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => drained += count,
            }
        }
    }
}

/// A client's request on its way to a worker, all but what tiny_http carries.
struct Exchange {
    stream: Stream,
    head: Head,
    peer: SocketAddr,
    started: Instant,
    body: Body,
    /// How much of the body came, and how long it was waited for.
    received: u64,
    waited: Duration,
    /// Why reading the body failed: ureq shows only an error of its own.
    fault: Option<Fault>,
}

impl Exchange {
    fn new(stream: Stream, head: Head, peer: SocketAddr) -> Exchange {
        Exchange {
            body: Body::new(head.framing),
            stream,
            head,
            peer,
            started: Instant::now(),
            received: 0,
            waited: Duration::ZERO,
            fault: None,
        }
    }

    fn unread(&self) -> bool {
        !self.body.done
    }

    /// Reads the body into memory, whole if it is small. A large one that says its size is not
    /// read at all; of one that does not, its beginning.
    fn hold(&mut self) -> Result<Vec<u8>, Fault> {
        if self.body.left > HELD_SIZE {
            return Ok(Vec::new());
        }
        let mut held = Vec::with_capacity(self.body.left as usize);
        let outcome = self.by_ref().take(HELD_SIZE).read_to_end(&mut held);
        let gone = |e: io::Error| Fault::Broken(e.to_string());
        outcome.map_err(|e| self.fault.take().unwrap_or_else(|| gone(e)))?;
        Ok(held)
    }

    fn read_body(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.head.expect) {
            self.stream.write_piece(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        // Only the time spent waiting for the client counts against it.
        let earned = Duration::from_millis(self.received * 1000 / BODY_RATE);
        let began = Instant::now();
        self.stream.socket.until = began + (BODY_GRACE + earned).saturating_sub(self.waited);
        let count = self.body.read(&mut self.stream, out)?;
        self.waited += began.elapsed();
        self.received += count as u64;
        Ok(count)
    }
}

/// The body, decoded.
impl Read for Exchange {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let fault = match self.read_body(out) {
            Ok(_) if self.received > BODY_SIZE => body_too_large().into(),
            Ok(count) => return Ok(count),
            Err(e) => match e.kind() {
                ErrorKind::TimedOut => {
                    Reply::new(408, "the body came too slowly; send it faster").into()
                }
                ErrorKind::InvalidData => malformed(&e.to_string()).into(),
                _ => Fault::Broken("the client went away while it sent the body".into()),
            },
        };
        self.fault = Some(fault);
        Err(io::Error::other("the request body broke off"))
    }
}

/// Takes a body out of a stream by its framing: one of a known size is one chunk. Chunks are
/// read strictly (RFC 9112 section 7.1), trailers dropped; what is wrong is `InvalidData`.
#[derive(Debug, Default)]
struct Body {
    /// Of the present chunk.
    left: u64,
    chunked: bool,
    begun: bool,
    done: bool,
}

impl Body {
    fn new(framing: Framing) -> Body {
        match framing {
            Framing::Empty | Framing::Sized(0) => Body {
                done: true,
                ..Body::default()
            },
            Framing::Sized(left) => Body {
                left,
                ..Body::default()
            },
            Framing::Chunked => Body {
                chunked: true,
                ..Body::default()
            },
        }
    }

    fn read(&mut self, source: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
        if self.chunked && self.left == 0 && !self.done {
            if self.begun && !chunk_line(source)?.is_empty() {
                return Err(invalid("a chunk is longer than its size"));
            }
            self.begun = true;
            let line = chunk_line(source)?;
            let size = line
                .split(';')
                .next()
                .filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()));
            let size = size.and_then(|size| u64::from_str_radix(size, 16).ok());
            self.left = size.ok_or_else(|| invalid("a chunk's size is not a number"))?;
            let mut lines = 0;
            self.done = self.left == 0;
            while self.done && !chunk_line(source)?.is_empty() {
                lines += 1;
                if lines > FIELD_COUNT {
                    return Err(invalid("there are too many trailers"));
                }
            }
        }
        if self.done || out.is_empty() {
            return Ok(0);
        }
        let room = out
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = source.read(&mut out[..room])?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        self.done = self.left == 0 && !self.chunked;
        Ok(count)
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

fn chunk_line(source: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    source.take(LINE_SIZE as u64).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let text = String::from_utf8(line).ok().filter(|text| text.is_ascii());
    let text = text.as_deref().and_then(|text| text.strip_suffix("\r\n"));
    let text = text.filter(|text| text.bytes().all(|b| b == b'\t' || !b.is_ascii_control()));
    let wrong = || invalid("a line between chunks is too long, not plain, or not ended by CRLF");
    text.map(str::to_owned).ok_or_else(wrong)
}

/// Passes the answer down as it comes: each piece is written at once.
fn relay(
    answer: http::Response<ureq::Body>,
    exchange: &mut Exchange,
    access: &mut Access,
) -> Result<(), Fault> {
    let gone = |e: io::Error| Fault::Broken(format!("the client went away, or took nothing: {e}"));
    let (parts, body) = answer.into_parts();
    let fields = parts.headers.iter();
    let fields = fields.map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default()));
    debug!("peer={} answer: {}", access.peer, shown(fields));
    let (head, chunked) = answer_head(&parts, &access.method, &mut exchange.head);
    access.status = parts.status.as_u16();
    access.request_id = parts
        .headers
        .get("request-id")
        .or(parts.headers.get("x-request-id"))
        .cloned();
    exchange.stream.write_piece(&head).map_err(gone)?;
    access.first = Some(exchange.started.elapsed());
    if access.method == "HEAD" || matches!(access.status, 204 | 304) {
        return Ok(());
    }
    // A chunk's size goes before the piece and CRLF behind it, so that it is one write.
    const SIZE: usize = "4000\r\n".len();
    let mut piece = vec![0; SIZE + PIECE_SIZE + 2];
    let mut reader = body.into_reader();
    loop {
        let count = match reader.read(&mut piece[SIZE..SIZE + PIECE_SIZE]) {
            Ok(0) => break,
            Ok(count) => count,
            Err(e) => {
                return Err(Fault::Broken(match ureq::Error::from(e) {
                    ureq::Error::Timeout(_) => "upstream was silent for stream_idle_timeout".into(),
                    e => format!("upstream broke off: {e}"),
                }));
            }
        };
        let end = SIZE + count;
        if chunked {
            piece[..SIZE].copy_from_slice(format!("{count:04x}\r\n").as_bytes());
            piece[end..end + 2].copy_from_slice(b"\r\n");
        }
        let whole = if chunked { 0..end + 2 } else { SIZE..end };
        exchange.stream.write_piece(&piece[whole]).map_err(gone)?;
        access.bytes += count as u64;
    }
    if chunked {
        exchange.stream.write_piece(b"0\r\n\r\n").map_err(gone)
    } else {
        Ok(())
    }
}

/// The answer's head, framed anew; and whether its body goes in chunks. HTTP/1.0 has none: there
/// the end of the connection is the end of a body without a size.
fn answer_head(parts: &http::response::Parts, method: &str, asked: &mut Head) -> (Vec<u8>, bool) {
    let connection = parts
        .headers
        .get_all("connection")
        .iter()
        .filter_map(|v| v.to_str().ok());
    let nominated: Vec<_> = connection
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .collect();
    let bodyless = method == "HEAD" || matches!(parts.status.as_u16(), 204 | 304);
    let sized = !parts.headers.contains_key(TRANSFER_ENCODING)
        && parts.headers.contains_key(CONTENT_LENGTH);
    asked.close |= !sized && !bodyless && asked.http10;
    let reason = parts.status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", parts.status.as_u16()).into_bytes();
    for (name, value) in &parts.headers {
        let ends_here = is_hop_by_hop(name.as_str())
            || nominated
                .iter()
                .any(|n| n.eq_ignore_ascii_case(name.as_str()));
        let unsaid =
            matches!(name.as_str(), "set-cookie" | "alt-svc") || name == CONTENT_LENGTH && !sized;
        if !ends_here && !unsaid {
            head.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
    }
    let chunked = !sized && !bodyless && !asked.http10;
    if chunked {
        head.extend(b"transfer-encoding: chunked\r\n");
    }
    if asked.close {
        head.extend(b"connection: close\r\n");
    }
    head.extend(b"\r\n");
    (head, chunked)
}

// ─── config ──────────────────────────────────────────────────────────────────────────────────
// In: the configuration file. Out: a `Config` that cannot be wrong, or one line that names the
// file, the field, what was found and what would be right; what was found is not shown where it
// could be a secret.

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    #[serde(deserialize_with = "listen_address")]
    listen: String,
    #[serde(deserialize_with = "path")]
    state_dir: PathBuf,
    #[serde(deserialize_with = "log_level")]
    log_level: LevelFilter,
    providers: Vec<ProviderSettings>,
    users: Vec<User>,
    #[serde(deserialize_with = "duration")]
    request_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    stream_idle_timeout: Duration,
    #[serde(deserialize_with = "interval")]
    refresh_check_interval: Duration,
    #[serde(deserialize_with = "workers")]
    workers: usize,
    #[serde(deserialize_with = "proxy")]
    proxy: Option<ureq::Proxy>,
    tls: Option<TlsFiles>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: ":8080".into(),
            state_dir: expand("~/.ai-mux").unwrap_or_default(),
            log_level: LevelFilter::Info,
            providers: Vec::new(),
            users: Vec::new(),
            request_timeout: Duration::from_secs(60),
            stream_idle_timeout: Duration::from_secs(300),
            refresh_check_interval: Duration::from_secs(600),
            workers: 64,
            proxy: None,
            tls: None,
        }
    }
}

/// A provider, as configured.
#[derive(Clone, Deserialize)]
#[serde(try_from = "RawProvider")]
struct ProviderSettings {
    provider: &'static Provider,
    headers: Vec<(HeaderName, HeaderValue)>,
    base_url: String,
    token_url: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProvider {
    name: String,
    #[serde(default)]
    headers: HashMap<String, Secret>,
    #[serde(default, deserialize_with = "url")]
    base_url: Option<String>,
    #[serde(default, deserialize_with = "url")]
    token_url: Option<String>,
}

impl TryFrom<RawProvider> for ProviderSettings {
    type Error = String;

    fn try_from(raw: RawProvider) -> Result<ProviderSettings, String> {
        let known = PROVIDERS.iter().find(|p| p.name == raw.name);
        let provider = known.ok_or_else(|| misfit("name", &raw.name, "claude or chatgpt"))?;
        let mut headers = Vec::new();
        for (name, value) in raw.headers {
            let key = HeaderName::try_from(&name)
                .ok()
                .filter(|n| !is_reserved(n.as_str()));
            let key = key.ok_or_else(|| misfit("headers", &name, "a header that may be set"))?;
            let value = HeaderValue::try_from(value.expose());
            headers.push((
                key,
                value.map_err(|_| format!("headers.{name}: not a header's value"))?,
            ));
        }
        let base_url = raw.base_url.unwrap_or_else(|| provider.base_url.into());
        let token_url = raw.token_url.unwrap_or_else(|| provider.token_url.into());
        Ok(ProviderSettings {
            provider,
            headers,
            base_url,
            token_url,
        })
    }
}

#[derive(Clone, Deserialize)]
#[serde(try_from = "RawUser")]
struct User {
    name: String,
    token: Secret,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    name: String,
    token: Option<Secret>,
    token_file: Option<String>,
}

impl TryFrom<RawUser> for User {
    type Error = String;

    fn try_from(raw: RawUser) -> Result<User, String> {
        let name = raw.name;
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(misfit("name", &name, "a name"));
        }
        let (field, token) = match (raw.token, raw.token_file) {
            (Some(token), None) => ("token", Some(token)),
            (None, Some(path)) => {
                let failed = |e| format!("token_file: read {path}: {e}");
                let text = fs::read_to_string(expand(&path)?).map_err(failed)?;
                ("token_file", Secret::new(text.trim()))
            }
            _ => return Err("expected one of `token` and `token_file`".into()),
        };
        let token = token.filter(|t| t.expose().len() >= 16 && !t.expose().contains(' '));
        let wrong = || format!("{field}: (not shown) expected 16 or more visible ASCII characters");
        Ok(User {
            token: token.ok_or_else(wrong)?,
            name,
        })
    }
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsFiles {
    #[serde(default)]
    enabled: bool,
    #[serde(rename = "cert_path", default, deserialize_with = "path")]
    cert: PathBuf,
    #[serde(rename = "key_path", default, deserialize_with = "path")]
    key: PathBuf,
}

impl TlsFiles {
    fn stamps(&self) -> [Option<Stamp>; 2] {
        [Stamp::of(&self.cert), Stamp::of(&self.key)]
    }

    fn load(&self) -> Result<Arc<CertifiedKey>, String> {
        for (field, path) in [("cert_path", &self.cert), ("key_path", &self.key)] {
            if path.as_os_str().is_empty() {
                return Err(format!("{field}: not given, expected a path"));
            }
        }
        let (cert, key) = (self.cert.display(), self.key.display());
        let pem = fs::read(&self.cert).map_err(|e| format!("cert_path: read {cert:?}: {e}"))?;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty());
        let chain =
            chain.ok_or_else(|| format!("cert_path: no certificate in {cert}, expected PEM"))?;
        let pem = fs::read(&self.key).map_err(|e| format!("key_path: read {key:?}: {e}"))?;
        // The parser's own error could quote the key.
        let der = PrivateKeyDer::from_pem_slice(&pem);
        let der = der.map_err(|_| format!("key_path: no private key in {key}, expected PEM"))?;
        let pair = CertifiedKey::from_der(chain, der, &rustls::crypto::ring::default_provider());
        pair.map(Arc::new)
            .map_err(|e| format!("key_path: {key} is not the key of {cert}: {e}"))
    }
}

impl Config {
    fn load(path: Option<&Path>) -> Result<Config, Error> {
        let Some(path) = path else {
            return Ok(Config::default());
        };
        let wrong = |e: &dyn Display| Error::config(format!("{}: {e}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| wrong(&format!("read: {e}")))?;
        let mut file: serde_yaml::Value = match path.extension().is_some_and(|e| e == "json") {
            true => serde_json::from_str(&text).map_err(|e| wrong(&e))?,
            false => serde_yaml::from_str(&text).map_err(|e| wrong(&e))?,
        };
        // The short forms: no value is the default, a provider's name is its entry.
        if file.is_null() {
            file = serde_yaml::Mapping::new().into();
        }
        if let Some(fields) = file.as_mapping_mut() {
            fields.retain(|_, value| !value.is_null())
        }
        for entry in file
            .get_mut("providers")
            .and_then(|p| p.as_sequence_mut())
            .into_iter()
            .flatten()
        {
            if entry.is_string() {
                let fields = [("name".into(), entry.clone())];
                *entry = serde_yaml::Mapping::from_iter(fields).into();
            }
        }
        let config = serde_path_to_error::deserialize(file);
        let mut config: Config = config.map_err(|e| wrong(&told(&e)))?;
        config.tls = config.tls.filter(|tls| tls.enabled);
        config.check().map_err(|e| wrong(&e))?;
        Ok(config)
    }

    /// What one field alone cannot tell.
    fn check(&self) -> Result<(), String> {
        for (at, user) in self.users.iter().enumerate() {
            if self.users[..at].iter().any(|other| other.name == user.name) {
                return Err(misfit(
                    &format!("users[{at}].name"),
                    &user.name,
                    "each name once",
                ));
            }
            if self.users[..at]
                .iter()
                .any(|other| other.token == user.token)
            {
                return Err(format!(
                    "users[{at}].token: (not shown) expected each token once"
                ));
            }
        }
        for (at, settings) in self.providers.iter().enumerate() {
            let name = settings.provider.name;
            if self.providers[..at]
                .iter()
                .any(|other| other.provider.name == name)
            {
                return Err(misfit(
                    &format!("providers[{at}].name"),
                    name,
                    "each provider once",
                ));
            }
        }
        if self.state_dir.as_os_str().is_empty() {
            return Err("state_dir: no HOME for its default, expected a path".into());
        }
        let tls = self.tls.as_ref().map(TlsFiles::load).transpose();
        tls.map(drop).map_err(|e| format!("tls.{e}"))
    }

    /// Those configured, or, where none is, those that have a credential file.
    fn providers(&self) -> Result<Vec<ProviderSettings>, Error> {
        if !self.providers.is_empty() {
            return Ok(self.providers.clone());
        }
        let found = PROVIDERS
            .iter()
            .filter(|p| p.path(&self.state_dir).exists());
        let found: Vec<_> = found
            .map(|provider| ProviderSettings {
                provider,
                headers: Vec::new(),
                base_url: provider.base_url.into(),
                token_url: provider.token_url.into(),
            })
            .collect();
        if found.is_empty() {
            let [claude, chatgpt] = PROVIDERS.each_ref().map(|p| p.path(&self.state_dir));
            let looked = format!(
                "neither {} nor {} is there",
                claude.display(),
                chatgpt.display()
            );
            return Err(Error::start(
                "find a login",
                looked + "; log in, or set `providers`",
            ));
        }
        Ok(found)
    }
}

fn misfit(field: &str, found: &str, right: &str) -> String {
    format!("{field}: found {found:?}, expected {right}")
}

/// serde's error, with the field's path. It ends in what was expected; what was found stays out
/// where a secret could have slipped to.
fn told(error: &serde_path_to_error::Error<serde_yaml::Error>) -> String {
    let (path, message) = (error.path().to_string(), error.inner().to_string());
    let secret = path == "."
        || ["users", "proxy"].iter().any(|p| path.starts_with(p))
        || path.contains("headers");
    match message.find("expected") {
        Some(at) if secret && message.contains("invalid") => {
            format!("{path}: (not shown) {}", &message[at..])
        }
        _ => format!("{path}: {message}"),
    }
}

fn expand(path: &str) -> Result<PathBuf, String> {
    match (path.strip_prefix('~'), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            Ok(PathBuf::from(home).join(rest.trim_start_matches('/')))
        }
        (None, _) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!(
            "found {path:?}, expected a path, or ~/PATH where HOME is set"
        )),
    }
}

/// A string, made into what it stands for; `right` says what that can be.
fn parsed<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    right: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A URL with a user in it has a password in it.
    let found = if text.contains('@') {
        "(not shown)"
    } else {
        &text
    };
    parse(&text).ok_or_else(|| de::Error::custom(format!("found {found:?}, expected {right}")))
}

fn listen_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    parsed(deserializer, "\":PORT\" or \"HOST:PORT\"", |text| {
        let (host, port) = text.rsplit_once(':')?;
        let plain = !host.contains(':') || host.starts_with('[') && host.ends_with(']');
        (plain && port.parse::<u16>().is_ok()).then(|| text.to_owned())
    })
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    expand(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LevelFilter, D::Error> {
    let levels = [
        LevelFilter::Debug,
        LevelFilter::Info,
        LevelFilter::Warn,
        LevelFilter::Error,
    ];
    let named = |text: &str| {
        levels
            .into_iter()
            .find(|l| l.as_str().to_ascii_lowercase() == text)
    };
    parsed(deserializer, "debug, info, warn or error", named)
}

fn workers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let number = u32::deserialize(deserializer)?;
    let right = (1..=4096).contains(&number).then_some(number as usize);
    right.ok_or_else(|| de::Error::custom(format!("found {number}, expected 1 to 4096")))
}

/// `60s`, `1h30m`, `1.5h`, `500ms`, or a whole number of seconds; more than nothing, and no more
/// than a year, so that no sum with a clock overflows.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let value = serde_yaml::Value::deserialize(deserializer)?;
    let seconds = value.as_u64().map(Duration::from_secs);
    let duration = seconds.or_else(|| humantime::parse_duration(value.as_str()?).ok());
    let year = Duration::from_secs(365 * 86400);
    let duration = duration.filter(|d| (Duration::from_millis(1)..=year).contains(d));
    let found = serde_yaml::to_string(&value).unwrap_or_default();
    let wrong = || {
        format!(
            "found {}, expected 60s, 10m, 1h30m or the like, or seconds",
            found.trim()
        )
    };
    duration.ok_or_else(|| de::Error::custom(wrong()))
}

fn interval<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let time = duration(deserializer)?;
    let right = Some(time).filter(|time| time.as_secs() >= 1);
    right.ok_or_else(|| de::Error::custom(format!("found {time:?}, expected at least 1s")))
}

fn proxy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ureq::Proxy>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let uri: Option<http::Uri> = text.parse().ok();
    let whole = uri.is_some_and(|uri| {
        let port = uri.authority().is_some_and(|a| {
            a.as_str()
                .ends_with(&format!("{}:{}", a.host(), a.port_u16().unwrap_or(0)))
                || a.as_str().ends_with(a.host())
        });
        uri.scheme().is_some() && uri.host().is_some_and(|host| !host.is_empty()) && port
    });
    let proxy = ureq::Proxy::new(&text).ok().filter(|_| whole).map(Some);
    let right = "(not shown) expected http://HOST:PORT, socks5://HOST:PORT or the like";
    proxy.ok_or_else(|| de::Error::custom(right))
}

fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let right = "https://HOST/PATH, or http:// to a loopback address; no user, no query";
    parsed(deserializer, right, |text| {
        let uri: http::Uri = text.parse().ok()?;
        let safe = uri.scheme_str() == Some("https")
            || uri.scheme_str() == Some("http") && is_loopback(&uri);
        let plain = uri.host().is_some_and(|h| !h.is_empty()) && !text.contains(['@', '?', '#']);
        (safe && plain).then(|| Some(text.trim_end_matches('/').to_owned()))
    })
}

// ─── replies and errors ──────────────────────────────────────────────────────────────────────
// A `Reply` is what a client hears from ai-mux itself, an `Error` what the operator reads when
// it cannot start. Both say what to do.

struct Error {
    code: u8,
    message: String,
}

impl Error {
    fn start(what: impl Display, why: impl Display) -> Error {
        Error {
            code: 1,
            message: format!("{what}: {why}"),
        }
    }

    fn config(message: impl Display) -> Error {
        Error {
            code: 2,
            message: message.to_string(),
        }
    }
}

#[derive(Debug)]
struct Reply {
    status: u16,
    message: String,
    retry_after: Option<Duration>,
}

impl Reply {
    fn new(status: u16, message: impl Into<String>) -> Reply {
        Reply {
            status,
            message: message.into(),
            retry_after: None,
        }
    }

    fn retry_after(self, wait: Duration) -> Reply {
        Reply {
            retry_after: Some(wait),
            ..self
        }
    }

    fn internal() -> Reply {
        Reply::new(500, "a fault of ai-mux; its log says more")
    }

    /// The error's type, in Anthropic's words, and its code.
    fn kind(&self) -> (&'static str, &'static str) {
        match self.status {
            400 => ("invalid_request_error", "malformed_request"),
            401 => ("authentication_error", "invalid_token"),
            403 => ("permission_error", "origin_not_allowed"),
            404 => ("not_found_error", "unknown_path"),
            408 => ("timeout_error", "request_too_slow"),
            413 | 431 => ("request_too_large", "request_too_large"),
            426 => ("invalid_request_error", "no_websocket"),
            502 => ("api_error", "upstream_unreachable"),
            503 => ("api_error", "unavailable"),
            504 => ("timeout_error", "upstream_too_slow"),
            _ => ("api_error", "internal"),
        }
    }

    /// The whole answer: head, and the body that both vendors' SDKs show.
    fn to_bytes(&self, head_only: bool, last: bool) -> Vec<u8> {
        let (kind, code) = self.kind();
        let error = serde_json::json!({ "type": kind, "message": self.message, "param": null, "code": code });
        let error = serde_json::json!({ "type": "error", "error": error }).to_string();
        let body = if self.status == 200 {
            &self.message
        } else {
            &error
        };
        let status = http::StatusCode::from_u16(self.status).unwrap_or_default();
        let mut text = format!(
            "HTTP/1.1 {} {}\r\n",
            self.status,
            status.canonical_reason().unwrap_or_default()
        );
        let mut add = |name: &str, value: &dyn Display| {
            let _ = write!(text, "{name}: {value}\r\n"); // writing to a String cannot fail
        };
        add("date", &httpdate::fmt_http_date(SystemTime::now()));
        add("content-type", &"application/json");
        add("content-length", &body.len());
        match self.status {
            401 => add("www-authenticate", &"Bearer"),
            426 => add("upgrade", &"HTTP/1.1"),
            _ => {}
        }
        if let Some(wait) = self.retry_after {
            add("retry-after", &wait.as_secs());
        }
        // Trying again cannot help; without this, SDKs do so for minutes and show nothing.
        if matches!(self.status, 400..500 | 503) && self.status != 408 && self.retry_after.is_none()
        {
            add("x-should-retry", &false);
        }
        if last {
            add("connection", &"close");
        }
        text.push_str("\r\n");
        text.push_str(if head_only { "" } else { body });
        text.into_bytes()
    }
}

fn malformed(why: &str) -> Reply {
    Reply::new(400, format!("malformed request: {why}"))
}

fn head_too_large() -> Reply {
    Reply::new(431, "the head is too large; send fewer or shorter headers")
}

fn body_too_large() -> Reply {
    Reply::new(
        413,
        format!("the body is larger than {} MiB; send less", BODY_SIZE >> 20),
    )
}

// ─── log ─────────────────────────────────────────────────────────────────────────────────────
// In: records of this program and its crates. Out: lines on standard error. No secret, and
// nothing that a client chose, gets here unless it was checked or escaped.

/// One line per request.
struct Access {
    peer: SocketAddr,
    started: Instant,
    user: String,
    provider: &'static str,
    method: String,
    path: String,
    status: u16,
    /// Of the answer's body.
    bytes: u64,
    first: Option<Duration>,
    request_id: Option<HeaderValue>,
    ended: Option<String>,
}

impl Access {
    fn new(peer: SocketAddr) -> Access {
        let none = || "-".to_owned();
        Access {
            peer,
            started: Instant::now(),
            user: none(),
            provider: "-",
            method: none(),
            path: none(),
            status: 0,
            bytes: 0,
            first: None,
            request_id: None,
            ended: None,
        }
    }

    fn reply(&mut self, reply: &Reply) {
        self.status = reply.status;
        self.first = Some(self.started.elapsed());
        self.ended = (reply.status != 200).then(|| reply.message.clone());
    }

    fn log(&self) {
        let Access {
            peer,
            user,
            provider,
            method,
            status,
            bytes,
            ..
        } = self;
        let path = self.path.get(..200).unwrap_or(&self.path); // ASCII, as the gate has seen to
        let user = if user.contains([' ', '"']) {
            format!("{user:?}")
        } else {
            user.clone()
        };
        let first = self
            .first
            .map_or("-".into(), |first| format!("{}ms", first.as_millis()));
        let total = self.started.elapsed().as_millis();
        let mut line = format!(
            "peer={peer} user={user} provider={provider} method={method} path={path} \
             status={status} bytes={bytes} first={first} total={total}ms"
        );
        if let Some(id) = self.request_id.as_ref().filter(|_| *status >= 400) {
            let plain = id
                .to_str()
                .ok()
                .filter(|id| id.len() <= 128 && !id.contains(['"', ' ']));
            line += &format!(" request-id={}", plain.unwrap_or("?"));
        }
        if let Some(why) = &self.ended {
            line += &format!(" ended={why:?}");
        }
        info!("{line}");
    }
}

/// Header fields for the log: the names of all, the values of those that are known to hold
/// neither a secret nor anything personal.
fn shown<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let harmless = [
        "accept",
        "accept-encoding",
        "anthropic-beta",
        "anthropic-version",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "date",
        "request-id",
        "retry-after",
        "transfer-encoding",
        "user-agent",
        "x-request-id",
        "x-should-retry",
    ];
    let shown =
        fields.map(
            |(name, value)| match harmless.iter().any(|h| h.eq_ignore_ascii_case(name)) {
                true => format!("{name}: {value:?}"),
                false => format!("{name}: ({} bytes)", value.len()),
            },
        );
    shown.collect::<Vec<_>>().join(", ")
}

/// simple_logger, but for two things: the time, where the journal does not write it, and a
/// standard error that nobody reads any more, on which it panics.
struct Log(simple_logger::SimpleLogger);

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        let mut line = record.args().to_string();
        if std::env::var_os("JOURNAL_STREAM").is_none() {
            let now = humantime::format_rfc3339_seconds(SystemTime::now());
            line = format!("{now} {line}");
        }
        let metadata = record.metadata().clone();
        let log = || {
            self.0.log(
                &log::Record::builder()
                    .metadata(metadata)
                    .args(format_args!("{line}"))
                    .build(),
            )
        };
        let _ = catch_unwind(AssertUnwindSafe(log));
    }

    fn flush(&self) {}
}

fn start_log(level: LevelFilter) {
    let mut logger = simple_logger::SimpleLogger::new().with_level(level);
    // At lower levels these print heads with tokens in them.
    for crate_name in ["ureq", "rustls", "tiny_http"] {
        logger = logger.with_module_level(crate_name, level.min(LevelFilter::Warn));
    }
    // A panic's message could hold anything; its place is enough. Not eprintln!, see above.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        let _ = writeln!(io::stderr(), "ERROR [ai_mux] panic at {place}");
    }));
    log::set_max_level(level);
    let _ = log::set_boxed_logger(Box::new(Log(logger))); // fails only if there is one already
}

// ─── secret ──────────────────────────────────────────────────────────────────────────────────

mod secret {
    //! A token that can be read in one way only.

    /// Never empty, and ASCII without controls, so that it fits a header.
    #[derive(Clone, PartialEq)]
    pub struct Secret(std::sync::Arc<str>);

    impl Secret {
        pub fn new(text: &str) -> Option<Secret> {
            let plain = text.bytes().all(|b| matches!(b, b' '..=b'~'));
            let fine = !text.is_empty() && text.trim() == text && plain;
            fine.then(|| Secret(text.into()))
        }

        pub fn expose(&self) -> &str {
            &self.0
        }
    }

    /// From a configuration: what was found is not shown.
    impl<'de> serde::Deserialize<'de> for Secret {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
            let value = serde_yaml::Value::deserialize(deserializer)?;
            let wrong = "(not shown) expected a string of visible ASCII, in quotes if need be";
            let secret = value.as_str().and_then(Secret::new);
            secret.ok_or_else(|| serde::de::Error::custom(wrong))
        }
    }
}
