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
//! credential file <── keeper thread, one a provider ──> token endpoint
//! ```
//!
//! tiny_http parses, queues and hands out requests, but never meets the network: on its own it
//! has no deadlines, hangs under a burst of connections, and aborts on an absurd Content-Length.
//! The **gate** meets the network: it reads one head, refuses what is malformed or ambiguous,
//! *parks* the client's stream as an **exchange** under a number, and passes the head alone, that
//! number first, to tiny_http over an **inner connection**. The **worker** that gets the request
//! takes the exchange, is the only one to read the body and write the answer, and ends with a
//! **verdict** on what becomes of the stream. An inner connection checked out is a **permit**:
//! there are as many as workers, so who holds one has a free worker.
//!
//! The file reads from the story to the reference: limits, main, gate, server, handler,
//! credential, upstream, stream, config, errors, log. A callee stands below its caller.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{LevelFilter, debug, error, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::Deserialize;
use serde::de::{self, Deserializer};
use serde_json::Value;
use subtle::ConstantTimeEq;
use ureq::http::{self, HeaderMap, HeaderName, HeaderValue};

use secret::Secret;

// ─── limits ──────────────────────────────────────────────────────────────────────────────────
// Every bound of the program, with its reason. Sizes are bytes.

/// A request head, request line and all fields.
const HEAD_SIZE: usize = 32 << 10;
/// One line of a head. Must fit ureq's output buffer, which takes a header line whole.
const LINE_SIZE: usize = 8 << 10;
/// Header fields in a request; what no real client reaches.
const FIELD_COUNT: usize = 100;
/// For a TLS handshake, and for a head from its first byte.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Between two requests. Clients pool connections for a minute or two.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// A request body; both vendors refuse larger ones themselves.
const BODY_SIZE: u64 = 64 << 20;
/// The part of a body that is held in memory so that it can be sent a second time.
const HELD_SIZE: usize = 1 << 20;
/// A body may make its sender wait this long, and a second more for each `BODY_RATE` it brought.
const BODY_GRACE: Duration = Duration::from_secs(10);
const BODY_RATE: u32 = 1 << 10;
/// What is read from upstream and written to the client in one go, and how long that may take.
const PIECE_SIZE: usize = 16 << 10;
const PIECE_TIME: Duration = Duration::from_secs(30);
/// How much of an unread body is taken after a refusal, so that the client reads the refusal.
const LINGER_SIZE: usize = 1 << 20;
const LINGER_TIME: Duration = Duration::from_secs(2);
/// A head that no worker has picked up by then was lost inside tiny_http.
const PICKUP_TIME: Duration = Duration::from_secs(5);
/// Client connections beyond those that workers serve: each is a thread of some 10 KiB.
const SPARE_CONNECTIONS: u64 = 1024;
/// Descriptors for the listeners, the log, files, name resolution and token calls.
const SPARE_DESCRIPTORS: u64 = 32;
/// Per worker: three of its inner connection (tiny_http clones its end), one upstream.
const WORKER_DESCRIPTORS: u64 = 4;
/// Virtual size of our threads' stacks; debug builds of the TLS code need the most.
const STACK_SIZE: usize = 512 << 10;
/// ureq's buffers, per upstream connection: an answer's head must fit the first, a header line
/// of ours the second. A larger input buffer gains nothing, as pieces are passed on at once.
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
/// An access token with less than this left is refreshed; one younger than this is not.
const TOKEN_MARGIN: Duration = Duration::from_secs(60);
/// What is believed of `expires_in`.
const LIFETIME_MIN: Duration = Duration::from_secs(60);
const LIFETIME_MAX: Duration = Duration::from_secs(30 * 86400);
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
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not eprintln!, which panics when nobody reads standard error.
            let _ = writeln!(io::stderr(), "ai-mux: {}", error.message);
            ExitCode::from(error.code)
        }
    }
}

fn run() -> Result<(), Error> {
    let config = match arguments(std::env::args().skip(1))? {
        Command::Print(text) => {
            let _ = io::stdout().write_all(text.as_bytes());
            return Ok(());
        }
        Command::Serve(path) => Config::load(path.as_deref())?,
    };
    start_log(config.log_level);
    let signal = signals().map_err(|e| Error::start(format!("register for signals: {e}")))?;
    let _claim = claim(&config.state_dir)?;
    let proxy = Arc::new(Proxy::new(&config)?);
    let gate = Gate::open(&config, proxy.clone())?;
    let keepers = proxy.start_keepers(config.refresh_check_interval)?;
    gate.accept(&signal);

    let deadline = Instant::now() + STOP_TIME;
    info!("stopping: waiting for running requests and refreshes");
    gate.drain(Instant::now() + DRAIN_TIME);
    proxy.stop_keepers(keepers, deadline);
    info!("stopped");
    Ok(())
}

enum Command {
    Print(String),
    Serve(Option<PathBuf>),
}

fn arguments(mut arguments: impl Iterator<Item = String>) -> Result<Command, Error> {
    let mut path = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" => return Ok(Command::Print(HELP.into())),
            "--version" => {
                let version = concat!("ai-mux ", env!("CARGO_PKG_VERSION"), "\n");
                return Ok(Command::Print(version.into()));
            }
            "--config" if path.is_none() => match arguments.next() {
                Some(value) => path = Some(PathBuf::from(value)),
                None => return Err(Error::config("--config: no path given".into())),
            },
            other => {
                let message = format!("unexpected argument {other:?}; see ai-mux --help");
                return Err(Error::config(message));
            }
        }
    }
    Ok(Command::Serve(path))
}

/// The read end of a pipe that gets a byte at the first SIGTERM or SIGINT; the second one ends
/// the process at once, with exit code 1.
fn signals() -> io::Result<UnixStream> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let (reader, writer) = UnixStream::pair()?;
    let seen = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, seen.clone())?;
        signal_hook::flag::register(signal, seen.clone())?;
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

/// Creates the state folder, private, and locks it: two processes that refresh one login with
/// the same single-use token would end it. The lock lives as long as the file it returns.
fn claim(state_dir: &Path) -> Result<File, Error> {
    let name = state_dir.display();
    let failed = |what: &str, e| Error::start(format!("{what} {name} (state_dir): {e}"));
    if !state_dir.is_dir() {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(|e| failed("create", e))?;
    }
    let folder = File::open(state_dir).map_err(|e| failed("open", e))?;
    match folder.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(Error::start(format!(
                "{name} (state_dir) is in use by another ai-mux: stop that one, or give this one a state_dir of its own"
            )));
        }
        Err(fs::TryLockError::Error(e)) => {
            warn!("{name}: cannot be locked ({e}); make sure that no second ai-mux uses it")
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
    condvar
        .wait_timeout(guard, time)
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .0
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_SIZE)
        .spawn(work)
}

// ─── gate ────────────────────────────────────────────────────────────────────────────────────
// In: client connections. Out: to tiny_http, heads that are well-formed and unambiguous, each
// with its exchange parked; to the client, only what is decided without a worker: a malformed
// head, a health answer, a full pool. No body passes here but what is drained after a refusal.

struct Gate {
    proxy: Arc<Proxy>,
    listeners: Vec<TcpListener>,
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

/// A client's request on its way to a worker, all but the head.
struct Exchange {
    stream: Stream,
    facts: Facts,
    peer: SocketAddr,
    started: Instant,
    /// What of the body is still to be read, how much came, and how long it was waited for.
    upload: Upload,
    received: u64,
    waited: Duration,
    /// Why reading the body failed.
    fault: Option<Fault>,
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
    fn open(config: &Config, proxy: Arc<Proxy>) -> Result<Arc<Gate>, Error> {
        let (workers, capacity) = descriptors(config.workers)?;
        let tls = config.tls.as_ref().map(Renewal::start).transpose()?;
        let listeners = listen(&config.listen)?;
        let exchanges = Arc::new(Exchanges::default());
        let (path, folder) = inner_path(&config.state_dir)?;
        let failed = |e: String| Error::start(format!("inner socket {}: {e}", path.display()));
        let listener = UnixListener::bind(&path).map_err(|e| failed(e.to_string()))?;
        let server =
            tiny_http::Server::from_listener(listener, None).map_err(|e| failed(e.to_string()))?;
        serve(server, workers, &exchanges, &proxy).map_err(|e| failed(e.to_string()))?;
        let inner = Inner {
            path,
            folder,
            exchanges,
            wait: config.request_timeout,
            idle: Mutex::new(Vec::new()),
            freed: Condvar::new(),
        };
        for _ in 0..workers {
            let connection = inner.connect().map_err(|e| Error::start(e.to_string()))?;
            lock(&inner.idle).push(Some(connection));
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        for listener in &listeners {
            let address = listener
                .local_addr()
                .map_err(|e| Error::start(format!("listen: {e}")))?;
            if proxy.users.is_empty() && !address.ip().is_loopback() {
                warn!(
                    "no users are configured: everyone who can reach {address} uses your subscription"
                );
            }
            info!("listening on {scheme}://{address}");
        }
        Ok(Arc::new(Gate {
            proxy,
            listeners,
            tls,
            inner,
            capacity,
            connections: Mutex::new(HashMap::new()),
            freed: Condvar::new(),
            stopping: AtomicBool::new(false),
        }))
    }

    /// Accepts connections until a signal comes: a thread for each, the longest idle one making
    /// room at the cap. While all are busy, or descriptors have run out, new ones wait in the
    /// listeners' queues.
    fn accept(self: &Arc<Gate>, signal: &UnixStream) {
        let mut number = 0;
        let mut waiting = false;
        loop {
            let mut sources = vec![PollFd::new(signal, PollFlags::IN)];
            sources.extend(self.listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)));
            if let Err(e) = poll(&mut sources, None)
                && e != rustix::io::Errno::INTR
            {
                error!("wait for connections: {e}");
                thread::sleep(Duration::from_millis(100));
            }
            let ready: Vec<bool> = sources.iter().map(|s| !s.revents().is_empty()).collect();
            if ready[0] {
                self.stopping.store(true, Ordering::SeqCst);
                return;
            }
            let ready = ready
                .iter()
                .skip(1)
                .zip(&self.listeners)
                .filter(|(ready, _)| **ready);
            for (_, listener) in ready {
                let outcome = self.make_room().then(|| listener.accept());
                let trouble = match outcome {
                    Some(Ok((socket, peer))) => {
                        number += 1;
                        self.admit(number, socket, peer).err()
                    }
                    Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    Some(Err(e)) => Some(e),
                    None => Some(io::Error::other(format!("all {} are busy", self.capacity))),
                };
                if let Some(e) = &trouble {
                    if !waiting {
                        warn!("new connections wait: {e}");
                    }
                    self.close_idle(1);
                    let connections = lock(&self.connections);
                    drop(wait(&self.freed, connections, Duration::from_millis(50)));
                }
                waiting = trouble.is_some();
            }
        }
    }

    fn make_room(&self) -> bool {
        let excess = (lock(&self.connections).len() + 1).saturating_sub(self.capacity);
        excess == 0 || self.close_idle(excess) >= excess
    }

    /// Shuts the longest idle connections, `count` at most; their threads then end by themselves.
    fn close_idle(&self, count: usize) -> usize {
        let mut connections = lock(&self.connections);
        let mut idle: Vec<_> = connections
            .iter()
            .filter_map(|(number, c)| Some((c.idle?, *number)))
            .collect();
        idle.sort_unstable();
        idle.truncate(count);
        for (_, number) in &idle {
            if let Some(connection) = connections.remove(number) {
                let _ = connection.socket.shutdown(Shutdown::Both);
            }
        }
        idle.len()
    }

    fn admit(self: &Arc<Gate>, number: u64, socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        let socket = Arc::new(socket);
        let idle = Some(Instant::now());
        lock(&self.connections).insert(
            number,
            Connection {
                socket: socket.clone(),
                idle,
            },
        );
        let gate = self.clone();
        let served = spawn("client", move || {
            if let Err(panic) =
                catch_unwind(AssertUnwindSafe(|| gate.converse(number, socket, peer)))
            {
                drop(panic);
                error!("peer={peer}: the gate panicked; its connection is closed");
            }
            lock(&gate.connections).remove(&number);
            gate.freed.notify_all();
        });
        if served.is_err() {
            lock(&self.connections).remove(&number);
        }
        served.map(drop)
    }

    /// One client connection, from handshake to close: a head, an exchange, a verdict, again.
    fn converse(&self, number: u64, socket: Arc<TcpStream>, peer: SocketAddr) {
        let mut stream = Stream::new(socket);
        if let Some(tls) = &self.tls
            && let Err(e) = stream.handshake(tls.clone())
        {
            debug!("peer={peer} TLS handshake: {e}");
            return;
        }
        while self.turn(number, true) {
            let verdict = match stream.read_head() {
                Ok(Some(head)) if self.turn(number, false) => self.exchange(stream, head, peer),
                Ok(_) => return,
                Err(refusal) => {
                    let mut access = Access::new(peer, Instant::now());
                    access.refused(&refusal);
                    access.bytes = stream.refuse(&refusal, false, true).unwrap_or(0);
                    access.log();
                    Verdict::Linger(stream)
                }
            };
            match verdict {
                Verdict::Next(next) => stream = next,
                Verdict::Linger(last) => return last.linger(),
                Verdict::Broken => return,
            }
        }
    }

    /// Notes whether a connection is idle; false when it has been closed to make room, or is to
    /// end because the program does.
    fn turn(&self, number: u64, idle: bool) -> bool {
        let mut connections = lock(&self.connections);
        if idle && self.stopping.load(Ordering::SeqCst) {
            return false;
        }
        let Some(connection) = connections.get_mut(&number) else {
            return false;
        };
        connection.idle = idle.then(Instant::now);
        drop(connections);
        if idle {
            self.freed.notify_all();
        }
        true
    }

    /// One request: answered here, or by a worker to whom the stream is lent.
    fn exchange(&self, mut stream: Stream, head: Head, peer: SocketAddr) -> Verdict {
        let started = Instant::now();
        let mut access = Access::new(peer, started);
        access.method = head.method.clone();
        access.path = head.path().to_owned();
        let last = head.facts.close || head.facts.framing != Framing::Empty;
        let outcome = if is_health(&head.method, head.path()) {
            let answer = self.proxy.health();
            access.status = 200;
            stream.answer(&answer, head.method == "HEAD", last)
        } else {
            match self.inner.exchange(stream, &head, peer, started) {
                Ok(verdict) => return verdict,
                Err((returned, refusal)) => {
                    stream = *returned;
                    access.refused(&refusal);
                    stream.refuse(&refusal, head.method == "HEAD", last)
                }
            }
        };
        match outcome {
            Ok(bytes) => access.bytes = bytes,
            Err(e) => access.ended = Some(format!("write to the client: {e}")),
        }
        access.first = Some(started.elapsed());
        let broken = access.ended.is_some();
        access.log();
        match (broken, last) {
            (true, _) => Verdict::Broken,
            (false, true) => Verdict::Linger(stream),
            (false, false) => Verdict::Next(stream),
        }
    }

    /// Closes idle connections and waits for the busy ones.
    fn drain(&self, deadline: Instant) {
        self.close_idle(usize::MAX);
        let mut connections = lock(&self.connections);
        while connections.values().any(|c| c.idle.is_none()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                warn!(
                    "{} requests were still running and are cut short",
                    connections.len()
                );
                break;
            }
            connections = wait(&self.freed, connections, left);
        }
        self.inner.remove();
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
    wait: Duration,
    /// Those not checked out; `None` is one that must be opened anew.
    idle: Mutex<Vec<Option<UnixStream>>>,
    freed: Condvar,
}

/// Parked exchanges by number, each with the only sender of its verdict. One without an
/// exchange proves an inner connection: that a worker has taken it is all its sender tells.
#[derive(Default)]
struct Exchanges {
    last: AtomicU64,
    parked: Mutex<HashMap<u64, (Option<Exchange>, Sender<Verdict>)>>,
}

impl Exchanges {
    fn park(&self, exchange: Option<Exchange>) -> (u64, Receiver<Verdict>) {
        let (sender, receiver) = mpsc::channel();
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        lock(&self.parked).insert(number, (exchange, sender));
        (number, receiver)
    }

    fn take(&self, number: u64) -> Option<(Option<Exchange>, Sender<Verdict>)> {
        lock(&self.parked).remove(&number)
    }
}

impl Inner {
    /// Lends the stream to a worker and returns its verdict, or gives the stream back with a
    /// refusal when no worker came free, or tiny_http lost the head.
    fn exchange(
        &self,
        stream: Stream,
        head: &Head,
        peer: SocketAddr,
        started: Instant,
    ) -> Result<Verdict, (Box<Stream>, Refusal)> {
        let Some(mut permit) = self.permit() else {
            return Err((Box::new(stream), Refusal::busy(self.wait)));
        };
        let exchange = Exchange::new(stream, head.facts.clone(), peer, started);
        let (number, verdict) = self.exchanges.park(Some(exchange));
        let sent = permit
            .connect()
            .and_then(|mut c| c.write_all(&head.inner(number)));
        let picked_up = sent.map_err(|e| e.to_string()).and_then(|()| {
            match verdict.recv_timeout(PICKUP_TIME) {
                Err(mpsc::RecvTimeoutError::Timeout) => Err("no worker picked the head up".into()),
                verdict => Ok(verdict.unwrap_or(Verdict::Broken)),
            }
        });
        match (picked_up, self.exchanges.take(number)) {
            (Ok(verdict), _) => Ok(verdict),
            (Err(_), None) => Ok(verdict.recv().unwrap_or(Verdict::Broken)),
            (Err(why), Some((exchange, _))) => {
                error!("inner connection: {why}; it is replaced");
                permit.connection = None;
                match exchange {
                    Some(exchange) => Err((Box::new(exchange.stream), Refusal::internal())),
                    None => Ok(Verdict::Broken),
                }
            }
        }
    }

    fn permit(&self) -> Option<Permit<'_>> {
        let deadline = Instant::now() + self.wait;
        let mut idle = lock(&self.idle);
        loop {
            if let Some(connection) = idle.pop() {
                return Some(Permit {
                    inner: self,
                    connection,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            idle = wait(&self.freed, idle, left);
        }
    }

    /// Opens an inner connection and sends a head on it that a worker must pick up.
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
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(io::Error::other("a new inner connection was not picked up"))
            }
            _ => Ok(connection),
        }
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
        if let Some(folder) = &self.folder {
            let _ = fs::remove_dir(folder);
        }
    }
}

struct Permit<'a> {
    inner: &'a Inner,
    connection: Option<UnixStream>,
}

impl Permit<'_> {
    fn connect(&mut self) -> io::Result<&UnixStream> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.inner.connect()?,
        };
        Ok(self.connection.insert(connection))
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        lock(&self.inner.idle).push(self.connection.take());
        self.inner.freed.notify_one();
    }
}

/// Where the inner socket lives: in `state_dir`, or in a private temporary folder where that is
/// read-only or its path too long for a socket address (107 bytes, unix(7)).
fn inner_path(state_dir: &Path) -> Result<(PathBuf, Option<PathBuf>), Error> {
    let path = state_dir.join("inner.sock");
    let _ = fs::remove_file(&path);
    if path.as_os_str().len() < 100 && UnixListener::bind(&path).is_ok() {
        let _ = fs::remove_file(&path);
        return Ok((path, None));
    }
    let folder = std::env::temp_dir().join(format!("ai-mux-{}", std::process::id()));
    let _ = fs::remove_file(folder.join("inner.sock")).and_then(|()| fs::remove_dir(&folder));
    match DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => Ok((folder.join("inner.sock"), Some(folder))),
        Err(e) => Err(Error::start(format!("create {}: {e}", folder.display()))),
    }
}

/// Raises the descriptor limit if it may, and says what it carries: (workers, connections).
fn descriptors(workers: usize) -> Result<(usize, usize), Error> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = workers as u64;
    let need = SPARE_DESCRIPTORS + wanted * (WORKER_DESCRIPTORS + 1) + SPARE_CONNECTIONS;
    let limits = getrlimit(Resource::Nofile);
    let hard = limits.maximum.unwrap_or(u64::MAX);
    let mut limit = limits.current.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(need.min(hard)),
        maximum: limits.maximum,
    };
    if limit < need.min(hard) && setrlimit(Resource::Nofile, raised).is_ok() {
        limit = need.min(hard);
    }
    let carried = limit.saturating_sub(SPARE_DESCRIPTORS) / (WORKER_DESCRIPTORS + 1);
    let workers = wanted.min(carried);
    if workers == 0 {
        let message =
            format!("the limit of {limit} open files is too low to start with; 64 is the least");
        return Err(Error::start(message));
    }
    if workers < wanted {
        warn!("the limit of {limit} open files carries {workers} workers instead of {wanted}");
    }
    let rest = limit - SPARE_DESCRIPTORS - workers * WORKER_DESCRIPTORS;
    Ok((
        workers as usize,
        rest.min(workers + SPARE_CONNECTIONS) as usize,
    ))
}

/// All listeners of `listen`: for `:PORT` both families, where one socket does not serve both.
fn listen(address: &str) -> Result<Vec<TcpListener>, Error> {
    let failed = |e: io::Error| Error::start(format!("listen on {address}: {e}"));
    let mut addresses: Vec<SocketAddr> = match address.strip_prefix(':') {
        Some(port) => [format!("[::]:{port}"), format!("0.0.0.0:{port}")]
            .iter()
            .filter_map(|a| a.parse().ok())
            .collect(),
        None => address.to_socket_addrs().map_err(failed)?.collect(),
    };
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut trouble = io::Error::other("the name has no address");
    for address in &mut addresses {
        if let (0, Some(Ok(first))) = (
            address.port(),
            listeners.first().map(TcpListener::local_addr),
        ) {
            address.set_port(first.port());
        }
        match TcpListener::bind(*address) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(failed)?;
                listeners.push(listener);
            }
            Err(e) => trouble = e,
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
        let stamps = |files: &TlsFiles| (Stamp::of(&files.cert), Stamp::of(&files.key));
        let mut seen = stamps(files);
        let pair = files
            .load()
            .map_err(|e| Error::config(format!("tls: {e}")))?;
        let renewal = Arc::new(Renewal(Mutex::new(pair)));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::start(format!("TLS: {e}")))?
            .with_no_client_auth()
            .with_cert_resolver(renewal.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let files = files.clone();
        let look = move || {
            loop {
                thread::sleep(RENEWAL_CHECK);
                let now = stamps(&files);
                if now != seen {
                    match files.load() {
                        Ok(pair) => {
                            *lock(&renewal.0) = pair;
                            info!(
                                "tls: the new certificate of {} is in use",
                                files.cert.display()
                            );
                        }
                        Err(e) => error!("tls: {e}; the old certificate stays in use"),
                    }
                    seen = now;
                }
            }
        };
        spawn("renewal", look).map_err(|e| Error::start(format!("start a thread: {e}")))?;
        Ok(Arc::new(config))
    }
}

impl rustls::server::ResolvesServerCert for Renewal {
    fn resolve(&self, _: rustls::server::ClientHello) -> Option<Arc<CertifiedKey>> {
        Some(lock(&self.0).clone())
    }
}

// ─── head ────────────────────────────────────────────────────────────────────────────────────
// In: the bytes of one head. Out: its parts, checked (RFC 9112 sections 2 to 6), or a refusal.
// What is accepted here, tiny_http reads the same way: no control characters, no bare LF, no
// folding, one length. Stricter than the RFC where a lenient reading could differ from ours.

/// The field that carries an exchange's number inside; no client may send it.
const EXCHANGE: &str = "x-ai-mux-exchange";

#[derive(Debug)]
struct Head {
    method: String,
    /// Origin form, as sent: path and query.
    target: String,
    /// As sent, values trimmed; without the fields that the gate itself acts upon.
    fields: Vec<(String, String)>,
    facts: Facts,
}

/// What a head says about its own connection: for the gate and the worker, not for upstream.
#[derive(Debug, Clone, Default, PartialEq)]
struct Facts {
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
/// `from` is where the search goes on: everything before it has been searched.
fn head_end(bytes: &[u8], from: usize) -> Result<Option<usize>, Refusal> {
    let mut start = bytes[..from]
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    for (at, _) in bytes
        .iter()
        .enumerate()
        .skip(from)
        .filter(|(_, b)| **b == b'\n')
    {
        if at == 0 || bytes[at - 1] != b'\r' {
            return Err(Refusal::malformed("a line of the head ends in a bare LF"));
        }
        if at - start == 1 {
            return Ok(Some(at + 1));
        }
        if at - start > LINE_SIZE {
            return Err(Refusal::head_too_large("a line of it", LINE_SIZE));
        }
        start = at + 1;
    }
    match (bytes.len() - start > LINE_SIZE, bytes.len() > HEAD_SIZE) {
        (true, _) => Err(Refusal::head_too_large("a line of it", LINE_SIZE)),
        (_, true) => Err(Refusal::head_too_large("it", HEAD_SIZE)),
        _ => Ok(None),
    }
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Head, Refusal> {
        let malformed = Refusal::malformed;
        if bytes.len() > HEAD_SIZE {
            return Err(Refusal::head_too_large("it", HEAD_SIZE));
        }
        let text = std::str::from_utf8(bytes).ok().filter(|t| t.is_ascii());
        let text = text.ok_or_else(|| malformed("the head is not ASCII"))?;
        let mut lines = text.split("\r\n").take_while(|line| !line.is_empty());
        let (method, target, http10) = request_line(lines.next().unwrap_or_default())?;
        let mut head = Head {
            method,
            target,
            fields: Vec::new(),
            facts: Facts {
                http10,
                close: http10,
                ..Facts::default()
            },
        };
        let mut fields = Fields::default();
        for (count, line) in lines.enumerate() {
            if count == FIELD_COUNT {
                return Err(Refusal::head_too_large(
                    "the number of its fields",
                    FIELD_COUNT,
                ));
            }
            let (name, value) = field(line)?;
            head.field(name, value, &mut fields)?;
        }
        match (fields.hosts, http10) {
            (1, _) | (0, true) => {}
            (0, false) => return Err(malformed("there is no Host")),
            _ => return Err(malformed("there is more than one Host")),
        }
        head.facts.framing = match (fields.length, fields.chunked) {
            (Some(_), true) => {
                return Err(malformed(
                    "Content-Length and Transfer-Encoding are both given",
                ));
            }
            (None, true) if http10 => return Err(malformed("HTTP/1.0 has no Transfer-Encoding")),
            (None, true) => Framing::Chunked,
            (Some(length), false) => Framing::Sized(length),
            (None, false) => Framing::Empty,
        };
        let bodied = !matches!(head.facts.framing, Framing::Empty | Framing::Sized(0));
        if bodied && head.method == "HEAD" {
            return Err(malformed("HEAD has no body"));
        }
        head.facts.expect &= bodied && !http10;
        Ok(head)
    }

    /// Takes one checked field: to keep, or to act upon.
    fn field(&mut self, name: &str, value: &str, seen: &mut Fields) -> Result<(), Refusal> {
        let malformed = |why| Err(Refusal::malformed(why));
        let lower = name.to_ascii_lowercase();
        match lower.as_str() {
            EXCHANGE => return malformed("x-ai-mux-exchange is not for clients"),
            "content-length" => {
                if seen.length.is_some() {
                    return malformed("Content-Length is given more than once");
                }
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
                    return malformed("Content-Length is not a number");
                }
                seen.length = Some(value.parse().unwrap_or(u64::MAX));
            }
            "transfer-encoding" => {
                if seen.chunked || !value.eq_ignore_ascii_case("chunked") {
                    return malformed("Transfer-Encoding is not just \"chunked\"");
                }
                seen.chunked = true;
            }
            "connection" => {
                let names = value
                    .split(',')
                    .map(|n| n.trim_matches([' ', '\t']).to_ascii_lowercase());
                self.facts.nominated.extend(names.filter(|n| !n.is_empty()));
                self.facts.close |= self.facts.nominated.iter().any(|n| n == "close");
            }
            "expect" => self.facts.expect |= value.eq_ignore_ascii_case("100-continue"),
            "upgrade" => {
                self.facts.websocket |= value
                    .split(',')
                    .any(|p| p.trim().eq_ignore_ascii_case("websocket"));
            }
            _ => {
                if lower == "host" {
                    seen.hosts += 1;
                    if !value
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-._:[]%~".contains(&b))
                    {
                        return malformed("Host is not a host");
                    }
                }
                self.fields.push((name.to_owned(), value.to_owned()));
            }
        }
        Ok(())
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The head as tiny_http gets it: written anew, from checked parts only.
    fn inner(&self, number: u64) -> Vec<u8> {
        let mut text = format!(
            "{} {} HTTP/1.1\r\n{EXCHANGE}: {number}\r\n",
            self.method, self.target
        );
        for (name, value) in &self.fields {
            let _ = write!(text, "{name}: {value}\r\n"); // writing to a String cannot fail
        }
        text.push_str("\r\n");
        text.into_bytes()
    }
}

#[derive(Default)]
struct Fields {
    length: Option<u64>,
    chunked: bool,
    hosts: usize,
}

/// RFC 9112 section 3, origin form only; method, target, and whether it is HTTP/1.0.
fn request_line(line: &str) -> Result<(String, String, bool), Refusal> {
    let malformed = |why| Err(Refusal::malformed(why));
    let mut parts = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return malformed("the request line is not: method, target, version");
    };
    let http10 = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        _ => return malformed("the version is neither HTTP/1.1 nor HTTP/1.0"),
    };
    let upper = |b: u8| b.is_ascii_uppercase() || b == b'-';
    if method.is_empty() || method.len() > 32 || !method.bytes().all(upper) {
        return malformed("the method is not a word of capital letters");
    }
    // TRACE would have the upstream send our token back to the client.
    if method == "TRACE" || method == "CONNECT" {
        return malformed("TRACE and CONNECT are not for proxies like this one");
    }
    if !target.starts_with('/') {
        return malformed("the target is not a path; absolute URLs are not for this proxy");
    }
    // What http::Uri takes; '#' would begin a fragment.
    let plain = |b: u8| matches!(b, 0x21 | 0x24..=0x3b | 0x3d | 0x3f..=0x7e);
    if !target.bytes().all(plain) {
        return malformed("the target has a character that must be percent-encoded");
    }
    Ok((method.to_owned(), target.to_owned(), http10))
}

/// RFC 9112 section 5: a token, a colon, a value of visible characters, spaces and tabs.
fn field(line: &str) -> Result<(&str, &str), Refusal> {
    let malformed = |why| Err(Refusal::malformed(why));
    let Some((name, value)) = line.split_once(':') else {
        return malformed("a header line has no colon");
    };
    if line.starts_with([' ', '\t']) {
        return malformed("a header line is folded");
    }
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(token) {
        return malformed("a header name has a character that names cannot have");
    }
    if !value.bytes().all(|b| matches!(b, b'\t' | b' '..=b'~')) {
        return malformed("a header value has a control character");
    }
    Ok((name, value.trim_matches([' ', '\t'])))
}

fn is_health(method: &str, path: &str) -> bool {
    match method {
        "GET" => path == "/healthz",
        "HEAD" => matches!(path, "/healthz" | "/" | "/claude" | "/chatgpt"),
        _ => false,
    }
}

// ─── server ──────────────────────────────────────────────────────────────────────────────────
// In: requests from tiny_http. Out: a verdict for each exchange, whatever happens to it, and its
// line in the access log. A panic in the handler ends here: it costs an answer, not a worker.

fn serve(
    server: tiny_http::Server,
    workers: usize,
    exchanges: &Arc<Exchanges>,
    proxy: &Arc<Proxy>,
) -> io::Result<()> {
    let server = Arc::new(server);
    for _ in 0..workers {
        let (server, exchanges, proxy) = (server.clone(), exchanges.clone(), proxy.clone());
        spawn("worker", move || {
            loop {
                match server.recv() {
                    Ok(request) => work(request, &exchanges, &proxy),
                    Err(e) => error!("tiny_http: {e}"),
                }
            }
        })?;
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
        let mut access = Access::new(exchange.peer, exchange.started);
        access.method = request.method().as_str().to_owned();
        access.path = request
            .url()
            .split('?')
            .next()
            .unwrap_or_default()
            .to_owned();
        let outcome = fence(&mut access, |access| {
            handle(proxy, &request, &mut exchange, access)
        });
        // The gate may have gone with the process; then nobody needs the verdict.
        let _ = verdict.send(conclude(outcome, exchange, &mut access));
    }
    drop(request.into_writer());
}

/// Turns a panic into a fault: 500 if nothing was sent yet, else a broken answer.
fn fence(
    access: &mut Access,
    work: impl FnOnce(&mut Access) -> Result<(), Fault>,
) -> Result<(), Fault> {
    match catch_unwind(AssertUnwindSafe(|| work(access))) {
        Ok(outcome) => outcome,
        Err(_) if access.status == 0 => Err(Fault::Refused(Refusal::internal())),
        Err(_) => Err(Fault::Broken("a fault of ai-mux (panic)".into())),
    }
}

fn conclude(outcome: Result<(), Fault>, mut exchange: Exchange, access: &mut Access) -> Verdict {
    let mut last = exchange.facts.close || exchange.unread();
    let outcome = match outcome {
        Err(Fault::Refused(refusal)) => {
            access.refused(&refusal);
            last |= refusal.status == 401;
            exchange
                .stream
                .refuse(&refusal, access.method == "HEAD", last)
                .map(|n| access.bytes = n)
        }
        Err(Fault::Broken(why)) => Err(io::Error::other(why)),
        Ok(()) => Ok(()),
    };
    if let Err(e) = &outcome {
        access.ended = Some(e.to_string());
    }
    access.log();
    match (outcome, last) {
        (Err(_), _) => Verdict::Broken,
        (Ok(()), true) => Verdict::Linger(exchange.stream),
        (Ok(()), false) => Verdict::Next(exchange.stream),
    }
}

/// Why a request was not answered whole.
enum Fault {
    /// Nothing was sent yet: the client is told.
    Refused(Refusal),
    /// The answer had begun, or there is nobody to answer: the reason, for the log.
    Broken(String),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Fault {
        Fault::Refused(refusal)
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
    debug!(
        "peer={} request {}",
        access.peer,
        shown(
            request
                .headers()
                .iter()
                .map(|h| (h.field.as_str().as_str(), h.value.as_str()))
        )
    );
    access.user = proxy.authenticate(request.headers())?.to_owned();
    let (upstream, url) = proxy.route(request.url())?;
    access.provider = upstream.provider.name;
    if exchange.facts.websocket {
        return Err(Refusal::websocket().into());
    }
    if matches!(exchange.facts.framing, Framing::Sized(length) if length > BODY_SIZE) {
        return Err(Refusal::body_too_large().into());
    }
    let token = upstream.credential.token()?;
    let outgoing = upstream.outgoing(request, url, &exchange.facts)?;
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
        let upstreams = config
            .providers()?
            .into_iter()
            .map(|provider| Upstream::new(provider, config, &network));
        Ok(Proxy {
            users: config.users.clone(),
            upstreams: upstreams.collect(),
        })
    }

    /// The user's name. All tokens given must be one and the same, and a user's; the comparison
    /// takes as long for a token that is nearly right, and for every user.
    fn authenticate(&self, headers: &[tiny_http::Header]) -> Result<&str, Refusal> {
        if self.users.is_empty() {
            // A web page must not use the subscription of whoever looks at it.
            return match headers.iter().any(|h| h.field.equiv("origin")) {
                true => Err(Refusal::origin()),
                false => Ok("-"),
            };
        }
        let mut given = None;
        for header in headers {
            let value = header.value.as_str();
            let token = match header.field.as_str().as_str() {
                name if name.eq_ignore_ascii_case("authorization") => match value.split_once(' ') {
                    Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                        token.trim_start()
                    }
                    _ => return Err(Refusal::wrong_token()),
                },
                name if name.eq_ignore_ascii_case("x-api-key") => value,
                _ => continue,
            };
            if given.replace(token).is_some_and(|other| other != token) {
                return Err(Refusal::wrong_token());
            }
        }
        let given = given.ok_or_else(Refusal::no_token)?;
        let same = |user: &User| bool::from(user.token.expose().as_bytes().ct_eq(given.as_bytes()));
        let found = self.users.iter().fold(
            None,
            |found, user| if same(user) { Some(user) } else { found },
        );
        found
            .map(|user| user.name.as_str())
            .ok_or_else(Refusal::wrong_token)
    }

    /// The upstream for a target, and the URL there. Nothing is decoded, and no segment is
    /// accepted that an upstream could decode to something else.
    fn route(&self, target: &str) -> Result<(&Upstream, String), Refusal> {
        let path = target.split('?').next().unwrap_or_default();
        let usual = |segment: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~:@".contains(&b);
            !matches!(segment, "" | "." | "..") && segment.bytes().all(plain)
        };
        let mut segments = path.split('/').skip(1);
        let upstream = self
            .upstreams
            .iter()
            .find(|u| Some(u.provider.name) == segments.clone().next());
        let known = segments.clone().all(usual)
            && segments.nth(1) == Some("v1")
            && segments
                .next()
                .is_some_and(|first| !first.eq_ignore_ascii_case("oauth"));
        match (upstream, known) {
            (Some(upstream), true) => {
                let rest = &target[1 + upstream.provider.name.len()..];
                let rest = if upstream.provider.keeps_v1 {
                    rest
                } else {
                    &rest["/v1".len()..]
                };
                Ok((upstream, format!("{}{rest}", upstream.base_url)))
            }
            _ => Err(Refusal::not_found()),
        }
    }

    /// Which providers can serve; nothing secret. JSON.
    fn health(&self) -> Vec<u8> {
        let ready = self.upstreams.iter().map(|u| {
            let state = if u.credential.token_is_at_hand() {
                "ready"
            } else {
                "unavailable"
            };
            (u.provider.name.to_owned(), Value::from(state))
        });
        let providers: serde_json::Map<String, Value> = ready.collect();
        serde_json::json!({ "status": "ok", "providers": providers })
            .to_string()
            .into_bytes()
    }

    fn start_keepers(&self, interval: Duration) -> Result<Vec<thread::JoinHandle<()>>, Error> {
        let start = |upstream: &Upstream| {
            let credential = upstream.credential.clone();
            spawn("keeper", move || credential.keep(interval))
        };
        let keepers: io::Result<_> = self.upstreams.iter().map(start).collect();
        keepers.map_err(|e| Error::start(format!("start a thread: {e}")))
    }

    fn stop_keepers(&self, keepers: Vec<thread::JoinHandle<()>>, deadline: Instant) {
        self.upstreams.iter().for_each(|u| u.credential.stop());
        while keepers.iter().any(|k| !k.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        if keepers.iter().any(|k| !k.is_finished()) {
            error!(
                "a refresh did not end in {}s; what it brought may be lost",
                STOP_TIME.as_secs()
            );
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

/// Requests read it and adopt what is new on disk, the keeper alone does the rest; both in short
/// locks, with file and network in between.
#[derive(Default)]
struct State {
    login: Login,
    /// Of the file when it was last read; `None` when it must be looked at again anyhow.
    stamp: Option<Stamp>,
    /// Counts changes of `login`, so that a slow reader of the file does not undo a newer one.
    version: u64,
    refreshed: Option<Instant>,
    failure: Option<Failure>,
    failures: u32,
    /// The access token that upstream answered with 401.
    rejected: Option<Secret>,
    unsaved: Option<Unsaved>,
    /// Requests take a number here and wait until the keeper has come to it.
    asked: u64,
    answered: u64,
    stopping: bool,
}

#[derive(Clone)]
enum Login {
    /// Why there is none, and what to do.
    Missing(String),
    Present(Token),
}

impl Default for Login {
    fn default() -> Login {
        Login::Missing("the login has not been read yet".into())
    }
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
    /// Whether it still is good `margin` from now, by the wall clock.
    fn lasts(&self, margin: Duration) -> bool {
        self.expires
            .is_none_or(|expires| expires > SystemTime::now() + margin)
    }
}

/// Why the last refresh brought nothing.
struct Failure {
    message: String,
    /// When to try again; `None`: not before the file changes.
    until: Option<Instant>,
}

/// A refresh's outcome that is not on disk: the refresh token it cost, which is still there.
#[derive(Clone)]
struct Unsaved {
    spent: Secret,
    answer: Answer,
}

/// What a token endpoint gave.
#[derive(Clone)]
struct Answer {
    access: Secret,
    refresh: Option<Secret>,
    id: Option<Secret>,
    expires: Option<SystemTime>,
}

/// A state of a file. Two that are equal hold the same bytes, but for the last `SETTLE_TIME`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stamp {
    place: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        fs::metadata(path).ok().map(|m| Stamp::from(&m))
    }

    fn settled(&self) -> bool {
        let modified = UNIX_EPOCH + Duration::from_secs(self.modified.0.max(0) as u64);
        SystemTime::now()
            .duration_since(modified)
            .is_ok_and(|age| age > SETTLE_TIME)
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(m: &fs::Metadata) -> Stamp {
        Stamp {
            place: (m.dev(), m.ino()),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        }
    }
}

/// What reading a credential file gives.
enum Reading {
    Token(Token),
    /// No login, whole or none at all: why, and what to do.
    None(String),
    /// Half-written, or being written.
    Unfinished(String),
}

/// For requests.
impl Credential {
    /// An access token to use now. Waits for a refresh only when there is none that is good.
    fn token(&self) -> Result<Token, Refusal> {
        self.look(false);
        let mut state = lock(&self.state);
        for last in [false, true] {
            let token = match (&state.login, &state.failure) {
                (Login::Missing(why), _) => return Err(Refusal::no_login(why)),
                (
                    _,
                    Some(Failure {
                        message,
                        until: None,
                    }),
                ) => return Err(Refusal::no_login(message)),
                (Login::Present(token), _) if token.lasts(Duration::ZERO) => token.clone(),
                (Login::Present(Token { refresh: None, .. }), _) => {
                    let why = format!(
                        "the {} login has expired; {}",
                        self.provider.name,
                        self.mend()
                    );
                    return Err(Refusal::no_login(&why));
                }
                (
                    _,
                    Some(Failure {
                        message,
                        until: Some(until),
                    }),
                ) if last || *until > Instant::now() => {
                    return Err(Refusal::no_token_yet(
                        message,
                        until.saturating_duration_since(Instant::now()),
                    ));
                }
                _ if last => {
                    return Err(Refusal::no_token_yet(
                        "the refresh was cut short",
                        BACKOFF_MIN,
                    ));
                }
                _ => {
                    state = self.ask(state);
                    continue;
                }
            };
            if !token.lasts(TOKEN_MARGIN)
                && token.refresh.is_some()
                && state.asked == state.answered
            {
                state.asked += 1; // ageing: the keeper is woken, nobody waits
                self.changed.notify_all();
            }
            return Ok(token);
        }
        Err(Refusal::internal())
    }

    /// Upstream answered 401 to this token: a newer one, from disk or from a refresh, if any.
    fn rejected(&self, token: &Token) -> Option<Token> {
        self.look(true);
        let mut state = lock(&self.state);
        let newer = |state: &State| match &state.login {
            Login::Present(now) if now.access != token.access => Some(now.clone()),
            _ => None,
        };
        let young = state
            .refreshed
            .is_some_and(|at| at.elapsed() < TOKEN_MARGIN);
        if newer(&state).is_none() && !young && state.failure.is_none() {
            state.rejected = Some(token.access.clone());
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

    fn token_is_at_hand(&self) -> bool {
        self.look(false);
        let state = lock(&self.state);
        let down = matches!(state.failure, Some(Failure { until: None, .. }));
        let usable = |token: &Token| token.refresh.is_some() || token.lasts(Duration::ZERO);
        !down && matches!(&state.login, Login::Present(token) if usable(token))
    }

    /// Adopts what is new on disk. `anyway` reads the file even if it seems unchanged.
    fn look(&self, anyway: bool) {
        for _ in 0..3 {
            let (known, version) = {
                let state = lock(&self.state);
                (state.stamp, state.version)
            };
            if !anyway && known.is_some() && known == Stamp::of(&self.path) {
                return;
            }
            let (stamp, reading) = self.read();
            let mut state = lock(&self.state);
            if state.version == version {
                self.adopt(&mut state, stamp, reading);
                return;
            }
        }
    }

    fn adopt(&self, state: &mut State, stamp: Option<Stamp>, reading: Reading) {
        let name = self.provider.name;
        state.stamp = stamp.filter(Stamp::settled);
        let login = match (reading, &state.login) {
            (Reading::Unfinished(why), Login::Present(_)) => {
                debug!("{name}: {why}; the login in memory stays");
                return;
            }
            (Reading::Unfinished(why) | Reading::None(why), _) => Login::Missing(why),
            (Reading::Token(token), Login::Present(now)) if token.same_login(now) => return,
            (Reading::Token(token), _) => {
                let spent = |unsaved: &Unsaved| token.refresh.as_ref() == Some(&unsaved.spent);
                if state.unsaved.as_ref().is_some_and(spent) {
                    return;
                }
                Login::Present(token)
            }
        };
        match (&login, &state.login) {
            (Login::Missing(why), Login::Missing(known)) if why == known => return,
            (Login::Missing(why), _) => warn!("{name}: {why}"),
            (Login::Present(_), _) => info!("{name}: login read from {}", self.path.display()),
        }
        let (asked, answered, version) = (state.asked, state.answered, state.version + 1);
        let (stamp, stopping) = (state.stamp, state.stopping);
        *state = State {
            login,
            stamp,
            version,
            asked,
            answered,
            stopping,
            ..State::default()
        };
    }

    /// Reads the file, and the stamp of what was read; the same before and after.
    fn read(&self) -> (Option<Stamp>, Reading) {
        for _ in 0..3 {
            let before = Stamp::of(&self.path);
            let reading = match self.open() {
                Ok(bytes) => match serde_json::from_slice::<Value>(&bytes) {
                    Ok(json) => self.provider.token_in(&json).map_or_else(
                        || {
                            Reading::None(format!(
                                "{} holds no login; {}",
                                self.path.display(),
                                self.mend()
                            ))
                        },
                        Reading::Token,
                    ),
                    Err(e) => {
                        let place = format!("line {}, column {}", e.line(), e.column());
                        let what = format!("{} is not whole JSON ({place})", self.path.display());
                        Reading::Unfinished(format!("{what}; if it stays so, {}", self.mend()))
                    }
                },
                Err(why) => Reading::None(why),
            };
            if before == Stamp::of(&self.path) {
                return (before, reading);
            }
        }
        (
            None,
            Reading::Unfinished(format!("{} keeps changing", self.path.display())),
        )
    }

    /// The bytes of the file, if it is ours to use; else why not, and what to do.
    fn open(&self) -> Result<Vec<u8>, String> {
        let name = self.path.display();
        let meta = fs::metadata(&self.path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => format!("{name} is not there; {}", self.mend()),
            _ => format!("read {name}: {e}; make it readable for the user that ai-mux runs as"),
        })?;
        let user = rustix::process::geteuid().as_raw();
        if meta.uid() != user {
            return Err(format!(
                "{name} belongs to user {}, ai-mux runs as {user}; chown {user} {name}",
                meta.uid()
            ));
        }
        if !meta.is_file() || meta.len() > FILE_SIZE {
            return Err(format!("{name} is not a credential file; {}", self.mend()));
        }
        if meta.mode() & 0o077 != 0 {
            let private = fs::Permissions::from_mode(0o600);
            let outcome = fs::set_permissions(&self.path, private).map_err(|e| e.to_string());
            let outcome =
                outcome.map_or_else(|e| format!("could not be: {e}"), |()| "now 0600".into());
            warn!(
                "{name}: mode {:o} lets others read it; {outcome}",
                meta.mode() & 0o7777
            );
        }
        let read = File::open(&self.path).and_then(|file| {
            let mut bytes = Vec::new();
            file.take(FILE_SIZE).read_to_end(&mut bytes).map(|_| bytes)
        });
        read.map_err(|e| {
            format!("read {name}: {e}; make it readable for the user that ai-mux runs as")
        })
    }

    /// What the owner does about a missing or dead login.
    fn mend(&self) -> String {
        let folder = self.path.parent().unwrap_or(&self.path).display();
        format!(
            "log in with: {}={folder} {}",
            self.provider.home, self.provider.login
        )
    }
}

impl Token {
    /// Whether a file that holds this one says nothing new; an expiry that only the file does
    /// not know does not count.
    fn same_login(&self, other: &Token) -> bool {
        self.access == other.access
            && self.refresh == other.refresh
            && self.account == other.account
    }
}

/// For the keeper.
impl Credential {
    fn keep(&self, interval: Duration) {
        loop {
            let asked = lock(&self.state).asked;
            let round = catch_unwind(AssertUnwindSafe(|| self.round(interval)));
            if round.is_err() {
                error!("{}: refresh: a fault of ai-mux (panic)", self.provider.name);
            }
            let mut state = lock(&self.state);
            state.answered = asked;
            state.rejected = None;
            self.changed.notify_all();
            let look = Instant::now() + interval;
            while state.asked == state.answered && !state.stopping {
                let retry = state.failure.as_ref().and_then(|f| f.until).unwrap_or(look);
                let left = retry.min(look).saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = wait(&self.changed, state, left);
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

    /// One look at the login, and a refresh if it is time for one.
    fn round(&self, interval: Duration) {
        self.look(false);
        self.save_again();
        if self.due(interval).is_none() {
            return;
        }
        self.look(true);
        let Some(spent) = self.due(interval) else {
            return;
        };
        match self.refresh(&spent) {
            Ok(()) => {}
            Err((message, until)) => {
                // Another tool may have refreshed meanwhile; then its login is the newer one.
                self.look(true);
                let mut state = lock(&self.state);
                let unchanged =
                    matches!(&state.login, Login::Present(t) if t.refresh.as_ref() == Some(&spent));
                if unchanged {
                    self.fail(&mut state, message, until);
                }
            }
        }
    }

    /// The refresh token to spend, when it is time to.
    fn due(&self, interval: Duration) -> Option<Secret> {
        let state = lock(&self.state);
        let Login::Present(token) = &state.login else {
            return None;
        };
        let backing_off = state
            .failure
            .as_ref()
            .is_some_and(|f| f.until.is_none_or(|at| at > Instant::now()));
        if backing_off {
            return None;
        }
        let young = state
            .refreshed
            .is_some_and(|at| at.elapsed() < TOKEN_MARGIN);
        let ageing = !young && !token.lasts(interval.saturating_add(TOKEN_MARGIN));
        let rejected = !young && state.rejected.as_ref() == Some(&token.access);
        (ageing || rejected || !token.lasts(Duration::ZERO))
            .then(|| token.refresh.clone())
            .flatten()
    }

    fn fail(&self, state: &mut State, message: String, until: Until) {
        let name = self.provider.name;
        let until = match until {
            Until::FileChanges => {
                let mend = self.mend();
                error!(
                    "{name}: refresh: {message}; it is down until {} changes: {mend}",
                    self.path.display()
                );
                state.failure = Some(Failure {
                    message: format!("{message}; {mend}"),
                    until: None,
                });
                return;
            }
            Until::After(wait) => {
                let doubled = BACKOFF_MIN
                    .saturating_mul(1 << state.failures.min(10))
                    .min(BACKOFF_MAX);
                wait.unwrap_or(Duration::ZERO)
                    .max(doubled)
                    .min(RETRY_AFTER_MAX)
            }
        };
        state.failures += 1;
        warn!(
            "{name}: refresh: {message}; next try in {}s",
            until.as_secs()
        );
        state.failure = Some(Failure {
            message,
            until: Some(Instant::now() + until),
        });
    }

    /// Spends a refresh token. What can be found out before that, is.
    fn refresh(&self, spent: &Secret) -> Result<(), (String, Until)> {
        let name = self.provider.name;
        if lock(&self.state).unsaved.is_some() {
            return Err((
                format!("{} could not be written yet", self.path.display()),
                Until::After(None),
            ));
        }
        let draft = Draft::new(&self.path).map_err(|why| {
            error!("{name}: {why}; nothing was spent");
            (why, Until::After(None))
        })?;
        let answer = self.call(spent)?;
        let unsaved = Unsaved {
            spent: spent.clone(),
            answer,
        };
        let outcome = self.save(&unsaved, draft);
        let mut state = lock(&self.state);
        if let Err(why) = outcome {
            error!("{name}: {why}; the new login is in memory only, and the write is tried again");
            let token = match &state.login {
                Login::Present(token) => unsaved.answer.applied_to(token),
                Login::Missing(_) => return Ok(()), // logged out meanwhile
            };
            state.adopt_refreshed(token, None);
            state.unsaved = Some(unsaved);
        }
        if let Login::Present(Token { expires, .. }) = &state.login {
            let left = expires.and_then(|at| at.duration_since(SystemTime::now()).ok());
            let left = left.map_or("at an unknown time".into(), |d| {
                format!(
                    "in {}",
                    humantime::format_duration(Duration::from_secs(d.as_secs()))
                )
            });
            info!("{name}: refreshed; the new token expires {left}");
        }
        Ok(())
    }

    /// Asks the token endpoint. Of its answer nothing but the `error` word is ever shown.
    fn call(&self, spent: &Secret) -> Result<Answer, (String, Until)> {
        let provider = self.provider;
        let passing = |message: String| (message, Until::After(None));
        let mut form = serde_json::json!({
            "grant_type": "refresh_token",
            "refresh_token": spent.expose(),
            "client_id": provider.client_id,
        });
        if let Some(scope) = provider.scope {
            form["scope"] = scope.into();
        }
        let agent = self.network.agent(&self.token_url, |config| {
            config.timeout_global(Some(TOKEN_TIME))
        });
        let body = form.to_string();
        let request = agent
            .post(&self.token_url)
            .header("content-type", "application/json");
        let mut answer = request
            .send(&body)
            .map_err(|e| passing(format!("{}: {e}", self.token_url)))?;
        let status = answer.status().as_u16();
        let wait = retry_after(answer.headers());
        let text = answer
            .body_mut()
            .with_config()
            .limit(TOKEN_SIZE)
            .read_to_vec();
        let text = text.map_err(|e| passing(format!("{}: answer: {e}", self.token_url)))?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        if status == 200 {
            let answer = Answer::from_json(&json);
            return answer
                .ok_or_else(|| passing("the token endpoint's answer holds no token".into()));
        }
        let word = error_word(&json);
        let message = format!("the token endpoint answered {status} {word}")
            .trim_end()
            .to_owned();
        match provider.is_final(status, word) {
            true => Err((message, Until::FileChanges)),
            false => Err((message, Until::After(wait))),
        }
    }

    /// Puts a refresh's outcome on disk, then into use, unless the file has a newer login or
    /// none any more: then the file wins.
    fn save(&self, unsaved: &Unsaved, draft: Draft) -> Result<(), String> {
        let name = self.path.display();
        let bytes = match self.open() {
            Ok(bytes) => bytes,
            Err(why) if !self.path.exists() => {
                self.look(true);
                warn!(
                    "{}: {why}; what the refresh brought is dropped",
                    self.provider.name
                );
                return Ok(());
            }
            Err(why) => return Err(why),
        };
        let mut json: Value =
            serde_json::from_slice(&bytes).map_err(|_| format!("{name} is not whole JSON"))?;
        let on_disk = self.provider.token_in(&json);
        if on_disk.as_ref().and_then(|t| t.refresh.as_ref()) != Some(&unsaved.spent) {
            let mut state = lock(&self.state);
            state.unsaved = None;
            drop(state);
            self.look(true);
            return Ok(());
        }
        self.provider.edit(&mut json, &unsaved.answer);
        let text = serde_json::to_vec_pretty(&json).map_err(|e| format!("write {name}: {e}"))?;
        draft
            .publish(&text)
            .map_err(|e| format!("write {name}: {e}"))?;
        let mut state = lock(&self.state);
        let known = match (&state.login, on_disk) {
            (Login::Present(token), _) => token.clone(),
            (Login::Missing(_), Some(token)) => token,
            (Login::Missing(_), None) => return Ok(()),
        };
        state.adopt_refreshed(unsaved.answer.applied_to(&known), Stamp::of(&self.path));
        Ok(())
    }

    /// Tries again to write what could not be written.
    fn save_again(&self) {
        let Some(unsaved) = lock(&self.state).unsaved.clone() else {
            return;
        };
        match Draft::new(&self.path).and_then(|draft| self.save(&unsaved, draft)) {
            Ok(()) => info!("{}: the login is on disk now", self.provider.name),
            Err(why) => error!(
                "{}: {why}; the new login is in memory only",
                self.provider.name
            ),
        }
    }
}

/// How long a failed refresh is not tried again.
enum Until {
    FileChanges,
    /// The back-off, or what the endpoint asked for if that is longer.
    After(Option<Duration>),
}

impl State {
    fn adopt_refreshed(&mut self, token: Token, stamp: Option<Stamp>) {
        self.login = Login::Present(token);
        self.stamp = stamp.filter(Stamp::settled);
        self.version += 1;
        self.refreshed = Some(Instant::now());
        self.failure = None;
        self.failures = 0;
        self.unsaved = None;
    }
}

impl Answer {
    fn from_json(json: &Value) -> Option<Answer> {
        let text = |key: &str| json.get(key).and_then(Value::as_str).and_then(Secret::new);
        let access = text("access_token")?;
        let now = SystemTime::now();
        let seconds = json
            .get("expires_in")
            .and_then(Value::as_f64)
            .map(|s| s.clamp(0.0, 1e10));
        let told =
            seconds.map(|s| now + Duration::from_secs_f64(s).clamp(LIFETIME_MIN, LIFETIME_MAX));
        let expires = told.or_else(|| Some(claims(&access)?.0?.max(now + LIFETIME_MIN)));
        Some(Answer {
            access,
            refresh: text("refresh_token"),
            id: text("id_token"),
            expires,
        })
    }

    fn applied_to(&self, old: &Token) -> Token {
        Token {
            access: self.access.clone(),
            refresh: self.refresh.clone().or_else(|| old.refresh.clone()),
            expires: self.expires,
            account: old.account.clone(),
        }
    }
}

/// A file that will replace another whole: written beside it, synced, renamed over it.
struct Draft {
    target: PathBuf,
    path: PathBuf,
    file: File,
    done: bool,
}

impl Draft {
    /// Proves that the folder can be written and has room, before anything depends on it.
    fn new(path: &Path) -> Result<Draft, String> {
        let failed = |e: io::Error| {
            let name = path.display();
            format!(
                "the folder of {name} cannot be written ({e}); ai-mux must be able to replace the file in it"
            )
        };
        let target = path.canonicalize().map_err(failed)?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let escaped = target.display().to_string().replace(' ', "\\040");
        if mounts
            .lines()
            .any(|line| line.split(' ').nth(4) == Some(&escaped))
        {
            return Err(format!(
                "{} is mounted by itself, so it cannot be replaced; mount its folder",
                target.display()
            ));
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".ai-mux-new");
        let draft = target.with_file_name(name);
        let _ = fs::remove_file(&draft);
        let size = fs::metadata(&target).map_err(failed)?.len() + TOKEN_SIZE;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)
            .map_err(failed)?;
        let mut draft = Draft {
            target,
            path: draft,
            file,
            done: false,
        };
        let room = io::copy(&mut io::repeat(b' ').take(size), &mut draft.file);
        room.and_then(|_| draft.file.sync_all()).map_err(failed)?;
        Ok(draft)
    }

    fn publish(mut self, text: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.file.write_all_at(text, 0)?;
        self.file.set_len(text.len() as u64)?;
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        self.done = true;
        let folder = self.target.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The `error` word of a token endpoint's answer (RFC 6749 section 5.2; OpenAI nests it), or ""
/// if it is nothing that looks like one.
fn error_word(json: &Value) -> &str {
    let error = json.get("error");
    let nested = error.and_then(|e| e.get("code").or(e.get("type")));
    let word = nested
        .or(error)
        .or(json.get("code"))
        .and_then(Value::as_str)
        .unwrap_or_default();
    let plain = word.len() <= 64
        && word
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if plain { word } else { "" }
}

/// `exp` and the account id of an access token that is a JWT (RFC 7519 section 4.1.4). It is
/// ours, from a source we trust, so its signature is not checked.
fn claims(token: &Secret) -> Option<(Option<SystemTime>, Option<Secret>)> {
    use base64::Engine;
    let payload = token.expose().split('.').nth(1)?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(payload.trim_end_matches('='))
        .ok()?;
    let json: Value = serde_json::from_slice(&bytes).ok()?;
    let account = json
        .get("https://api.openai.com/auth")
        .and_then(|a| a.get("chatgpt_account_id"));
    let account = account.and_then(Value::as_str).and_then(Secret::new);
    Some((json.get("exp").and_then(time), account))
}

/// A time as credential files have it: milliseconds above 10¹¹, else seconds.
fn time(value: &Value) -> Option<SystemTime> {
    let number = value.as_f64()?.clamp(0.0, 1e15);
    let seconds = if number > 1e11 {
        number / 1000.0
    } else {
        number
    };
    Some(UNIX_EPOCH + Duration::from_secs_f64(seconds))
}

/// `Retry-After` in either form (RFC 9110 section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("retry-after")?.to_str().ok()?;
    let date = || {
        httpdate::parse_http_date(text)
            .ok()?
            .duration_since(SystemTime::now())
            .ok()
    };
    text.trim()
        .parse()
        .ok()
        .map(Duration::from_secs)
        .or_else(date)
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
    /// The error words that end a login, with status 400 or 401; `None`: every 4xx but 408, 429.
    final_words: Option<&'static [&'static str]>,
    file: &'static str,
    /// What its file can look like: the first form whose object is there.
    forms: &'static [Form],
    /// The variable that tells the vendor's tool its folder, and the command that logs in.
    home: &'static str,
    login: &'static str,
}

/// Where a credential file keeps what. Keys are of `object`, or of the file itself.
struct Form {
    object: Option<&'static str>,
    access: &'static str,
    refresh: &'static str,
    expires: Option<&'static str>,
    account: Option<&'static str>,
    id: Option<&'static str>,
    /// A key of the file itself.
    last_refresh: Option<&'static str>,
    /// The unit of `expires` where the file has none yet.
    milliseconds: bool,
}

/// Addresses, client ids, file names and error words: the vendors' own tools, Claude Code and
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
        forms: &[Form {
            object: Some("claudeAiOauth"),
            access: "accessToken",
            refresh: "refreshToken",
            expires: Some("expiresAt"),
            account: None,
            id: None,
            last_refresh: None,
            milliseconds: true,
        }],
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
        forms: &[
            Form {
                object: Some("tokens"),
                access: "access_token",
                refresh: "refresh_token",
                expires: None,
                account: Some("account_id"),
                id: Some("id_token"),
                last_refresh: Some("last_refresh"),
                milliseconds: false,
            },
            Form {
                object: None,
                access: "access_token",
                refresh: "refresh_token",
                expires: Some("expires_at"),
                account: Some("account_id"),
                id: None,
                last_refresh: None,
                milliseconds: false,
            },
        ],
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
            None => (400..500).contains(&status) && status != 408 && status != 429,
        }
    }

    fn form(&self, json: &Value) -> Option<&'static Form> {
        let there = |form: &&Form| {
            form.object
                .is_none_or(|key| json.get(key).is_some_and(Value::is_object))
        };
        self.forms.iter().find(there)
    }

    fn token_in(&self, json: &Value) -> Option<Token> {
        let form = self.form(json)?;
        let object = form.object.map_or(Some(json), |key| json.get(key))?;
        let text = |key: &str| {
            object
                .get(key)
                .and_then(Value::as_str)
                .and_then(Secret::new)
        };
        let access = text(form.access)?;
        let (exp, claimed) = claims(&access).unwrap_or_default();
        let expires = form
            .expires
            .and_then(|key| object.get(key))
            .and_then(time)
            .or(exp);
        let account = form.account.and_then(|key| text(key).or(claimed));
        Some(Token {
            refresh: text(form.refresh),
            expires,
            account,
            access,
        })
    }

    /// Writes a refresh's outcome into the parsed file; all else stays.
    fn edit(&self, json: &mut Value, answer: &Answer) {
        let Some(form) = self.form(json) else { return };
        let now = SystemTime::now();
        if let Some(key) = form.last_refresh {
            json[key] = humantime::format_rfc3339_micros(now).to_string().into();
        }
        let object = match form.object {
            Some(key) => &mut json[key],
            None => json,
        };
        object[form.access] = answer.access.expose().into();
        if let Some(refresh) = &answer.refresh {
            object[form.refresh] = refresh.expose().into();
        }
        if let (Some(key), Some(id)) = (form.id, &answer.id) {
            object[key] = id.expose().into();
        }
        if let Some(key) = form.expires {
            let old = object.get(key).and_then(Value::as_f64);
            let milliseconds = old.map_or(form.milliseconds, |old| old > 1e11);
            // The tools that share the file need a time: an hour, where nobody told one.
            let expires = answer.expires.unwrap_or(now + Duration::from_secs(3600));
            let since = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
            let number = if milliseconds {
                since.as_millis() as u64
            } else {
                since.as_secs()
            };
            object[key] = number.into();
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
        let set = names
            .iter()
            .find(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty()));
        let proxy = match (&config.proxy, set) {
            (Some(proxy), _) => Some(proxy.clone()),
            (None, Some(name)) => {
                let proxy = ureq::Proxy::try_from_env();
                let wrong = || {
                    Error::start(format!(
                        "{name} is no proxy URL (its value is not shown); http://host:port is one"
                    ))
                };
                Some(proxy.ok_or_else(wrong)?)
            }
            (None, None) => None,
        };
        let roots = match std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) {
            None => ureq::tls::RootCerts::WebPki,
            Some(path) => {
                let name = format!("SSL_CERT_FILE {}", Path::new(&path).display());
                let pem = fs::read(&path).map_err(|e| Error::start(format!("read {name}: {e}")))?;
                let items = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
                    Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                let certificates: Vec<_> = items.collect();
                if certificates.is_empty() {
                    return Err(Error::start(format!(
                        "{name}: no certificate in it; a PEM bundle was expected"
                    )));
                }
                ureq::tls::RootCerts::from(certificates)
            }
        };
        Ok(Network { proxy, roots })
    }

    /// A ureq agent with everything automatic off.
    fn agent(&self, url: &str, limits: impl FnOnce(AgentConfig) -> AgentConfig) -> ureq::Agent {
        let loopback = url.parse().is_ok_and(|uri| is_loopback(&uri));
        let tls = ureq::tls::TlsConfig::builder()
            .root_certs(self.roots.clone())
            .build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
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

fn is_loopback(uri: &http::Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
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
        let time = Some(config.request_timeout);
        // A literal address needs no resolver, whose time limit would cost a thread a request.
        let literal = settings.base_url.parse::<http::Uri>().ok().and_then(|uri| {
            uri.host()?
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .ok()
        });
        let agent = network.agent(&settings.base_url, |agent| {
            agent
                .timeout_resolve(time.filter(|_| literal.is_none()))
                .timeout_connect(time)
                .timeout_send_request(time)
                .timeout_per_write(time)
                .timeout_recv_response(time)
                .timeout_per_read(Some(config.stream_idle_timeout))
                .max_idle_connections(config.workers)
                .max_idle_connections_per_host(config.workers)
        });
        let credential = Credential {
            provider: settings.provider,
            path: settings.provider.path(&config.state_dir),
            token_url: settings.token_url,
            network: network.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Upstream {
            provider: settings.provider,
            base_url: settings.base_url,
            headers: settings.headers,
            agent,
            credential: Arc::new(credential),
            request_timeout: config.request_timeout,
        }
    }

    /// The header policy.
    fn outgoing(
        &self,
        request: &tiny_http::Request,
        url: String,
        facts: &Facts,
    ) -> Result<Outgoing, Refusal> {
        let mut headers = HeaderMap::with_capacity(request.headers().len() + 8);
        for header in request.headers() {
            let name = header.field.as_str().as_str().to_ascii_lowercase();
            if self.is_dropped(&name) || facts.nominated.contains(&name) {
                continue;
            }
            let name = HeaderName::from_bytes(name.as_bytes());
            let value = HeaderValue::from_str(header.value.as_str());
            let (Ok(name), Ok(value)) = (name, value) else {
                return Err(Refusal::malformed("a header cannot be passed on"));
            };
            headers.append(name, value);
        }
        for (name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        if let Some(beta) = self.provider.beta {
            let merged = merged_beta(&headers, beta);
            let merged = HeaderValue::try_from(merged)
                .map_err(|_| Refusal::malformed("anthropic-beta cannot be passed on"))?;
            headers.insert("anthropic-beta", merged);
        }
        let method = http::Method::from_bytes(request.method().as_str().as_bytes());
        let method = method.map_err(|_| Refusal::malformed("the method cannot be passed on"))?;
        match facts.framing {
            Framing::Sized(length) => {
                drop(headers.insert(http::header::CONTENT_LENGTH, length.into()))
            }
            Framing::Chunked => {
                headers.insert(
                    http::header::TRANSFER_ENCODING,
                    HeaderValue::from_static("chunked"),
                );
            }
            // Without it ureq would send these chunked (RFC 9110 section 8.6 wants it anyway).
            Framing::Empty if matches!(method.as_str(), "POST" | "PUT" | "PATCH") => {
                headers.insert(http::header::CONTENT_LENGTH, 0.into());
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
            || (self.provider.beta.is_none() && name.starts_with("anthropic-"))
    }

    fn send(
        &self,
        outgoing: &Outgoing,
        token: &Token,
        held: &[u8],
        exchange: &mut Exchange,
    ) -> Result<http::Response<ureq::Body>, Fault> {
        let secret = |text: &str| {
            let value = HeaderValue::try_from(text).map(|mut value| {
                value.set_sensitive(true);
                value
            });
            value.map_err(|_| Refusal::internal())
        };
        let mut headers = outgoing.headers.clone();
        headers.insert(
            http::header::AUTHORIZATION,
            secret(&format!("Bearer {}", token.access.expose()))?,
        );
        if let Some(account) = &token.account {
            headers.insert("chatgpt-account-id", secret(account.expose())?);
        }
        let bodied = [
            http::header::CONTENT_LENGTH,
            http::header::TRANSFER_ENCODING,
        ];
        let bodied = bodied.iter().any(|name| headers.contains_key(name));
        let request = http::Request::builder()
            .method(outgoing.method.clone())
            .uri(&outgoing.url)
            .body(());
        let mut request = request.map_err(|_| Refusal::malformed("the target is not a URL"))?;
        *request.headers_mut() = headers;
        let mut body = held.chain(&mut *exchange);
        let answer = match bodied {
            true => self
                .agent
                .run(request.map(|()| ureq::SendBody::from_reader(&mut body))),
            false => self.agent.run(request),
        };
        match (answer, exchange.fault.take()) {
            (Ok(answer), _) => Ok(answer),
            (Err(_), Some(fault)) => Err(fault),
            (Err(ureq::Error::Timeout(_)), None) => {
                Err(Refusal::too_slow(self.provider.name, self.request_timeout).into())
            }
            (Err(e), None) => Err(Refusal::unreachable(self.provider.name, &e).into()),
        }
    }
}

/// Headers that neither a client nor a configuration may send upstream: authentication, account,
/// framing, `host`, hop-by-hop (RFC 9110 section 7.6.1).
fn is_reserved(name: &str) -> bool {
    matches!(
        name,
        "authorization"
            | "x-api-key"
            | "cookie"
            | "host"
            | "expect"
            | "chatgpt-account-id"
            | "content-length"
            | "transfer-encoding"
            | "connection"
            | "keep-alive"
            | "te"
            | "trailer"
            | "upgrade"
    ) || name.starts_with("proxy-")
}

/// The values of `anthropic-beta` in their order, with ours once.
fn merged_beta(headers: &HeaderMap, ours: &str) -> String {
    let mut merged: Vec<&str> = Vec::new();
    for value in headers.get_all("anthropic-beta") {
        let items = value.to_str().unwrap_or_default().split(',').map(str::trim);
        for item in items.filter(|item| !item.is_empty()) {
            if item != ours || !merged.contains(&ours) {
                merged.push(item);
            }
        }
    }
    if !merged.contains(&ours) {
        merged.push(ours);
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
    /// What the kernel was last told, so that it is told again only when it matters.
    read_timeout: Duration,
    write_timeout: Duration,
}

impl Socket {
    /// The time left, when the kernel must be told; it may be told less, since every wait is
    /// followed by another look at the clock.
    fn left(until: Instant, told: Duration) -> io::Result<Option<Duration>> {
        let left = until.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let near = told >= left / 2 && told <= left + Duration::from_millis(100);
        Ok((!near).then_some(left))
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(left) = Socket::left(self.until, self.read_timeout)? {
                self.tcp.set_read_timeout(Some(left))?;
                self.read_timeout = left;
            }
            match (&*self.tcp).read(out) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                outcome => return outcome,
            }
        }
    }
}

impl Socket {
    fn write_with(
        &mut self,
        write: impl Fn(&mut &TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            if let Some(left) = Socket::left(self.until, self.write_timeout)? {
                self.tcp.set_write_timeout(Some(left))?;
                self.write_timeout = left;
            }
            match write(&mut &*self.tcp) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                outcome => return outcome,
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_with(|tcp| tcp.write(bytes))
    }

    /// rustls hands over all records of a piece at once: one system call.
    fn write_vectored(&mut self, parts: &[io::IoSlice]) -> io::Result<usize> {
        self.write_with(|tcp| tcp.write_vectored(parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Stream {
    socket: Socket,
    tls: Option<Box<rustls::ServerConnection>>,
    /// Read from the client but not used yet, from `used` on: it travels with the stream.
    ahead: Vec<u8>,
    used: usize,
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let ahead = &self.ahead[self.used..];
        if !ahead.is_empty() {
            let count = ahead.len().min(out.len());
            out[..count].copy_from_slice(&ahead[..count]);
            self.consume(count);
            return Ok(count);
        }
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(out),
            None => self.socket.read(out),
        }
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.ahead.len() {
            self.fill()?;
        }
        Ok(&self.ahead[self.used..])
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
        if self.used == self.ahead.len() {
            self.ahead = Vec::new(); // an idle connection holds no buffer
            self.used = 0;
        }
    }
}

impl Stream {
    fn new(tcp: Arc<TcpStream>) -> Stream {
        let (read_timeout, write_timeout) = (Duration::ZERO, Duration::ZERO);
        let socket = Socket {
            tcp,
            until: Instant::now(),
            read_timeout,
            write_timeout,
        };
        Stream {
            socket,
            tls: None,
            ahead: Vec::new(),
            used: 0,
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
        let count = match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(&mut chunk)?,
            None => self.socket.read(&mut chunk)?,
        };
        self.ahead.extend_from_slice(&chunk[..count]);
        Ok(count)
    }

    /// The next head; `None` when the client has nothing more to say.
    fn read_head(&mut self) -> Result<Option<Head>, Refusal> {
        let idle = self.used == self.ahead.len();
        self.socket.until = Instant::now() + if idle { IDLE_TIME } else { HEAD_TIME };
        let (mut searched, mut skipped) = (0, false);
        loop {
            // One empty line before a request is nothing (RFC 9112 section 2.2).
            if !skipped && self.ahead[self.used..].starts_with(b"\r\n") {
                self.consume(2);
                (searched, skipped) = (0, true);
            }
            let ahead = &self.ahead[self.used..];
            if let Some(length) = head_end(ahead, searched)? {
                let head = Head::parse(&ahead[..length])?;
                self.consume(length);
                return Ok(Some(head));
            }
            searched = ahead.len();
            let begun = searched > 0 || skipped;
            match self.fill() {
                Ok(0) => return Ok(None),
                Ok(_) if begun => {}
                Ok(_) => self.socket.until = Instant::now() + HEAD_TIME,
                Err(e) if e.kind() == io::ErrorKind::TimedOut && begun => {
                    return Err(Refusal::head_too_slow());
                }
                Err(_) => return Ok(None),
            }
        }
    }

    fn write_piece(&mut self, piece: &[u8]) -> io::Result<()> {
        self.socket.until = Instant::now() + PIECE_TIME;
        match &mut self.tls {
            Some(tls) => {
                let mut stream = rustls::Stream::new(&mut **tls, &mut self.socket);
                stream.write_all(piece)?;
                stream.flush()
            }
            None => self.socket.write_all(piece),
        }
    }

    fn refuse(&mut self, refusal: &Refusal, head_only: bool, last: bool) -> io::Result<u64> {
        self.write_answer(
            refusal.status,
            &refusal.headers(),
            &refusal.body(),
            head_only,
            last,
        )
    }

    fn answer(&mut self, body: &[u8], head_only: bool, last: bool) -> io::Result<u64> {
        self.write_answer(200, "", body, head_only, last)
    }

    /// An answer of our own, JSON. The size of its body comes back.
    fn write_answer(
        &mut self,
        status: u16,
        fields: &str,
        body: &[u8],
        head_only: bool,
        last: bool,
    ) -> io::Result<u64> {
        let reason = http::StatusCode::from_u16(status)
            .ok()
            .and_then(|s| s.canonical_reason());
        let date = httpdate::fmt_http_date(SystemTime::now());
        let close = if last { "connection: close\r\n" } else { "" };
        let mut bytes = format!(
            "HTTP/1.1 {status} {}\r\ndate: {date}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{close}{fields}\r\n",
            reason.unwrap_or_default(),
            body.len(),
        )
        .into_bytes();
        let sent = if head_only { &[] } else { body };
        bytes.extend_from_slice(sent);
        self.write_piece(&bytes)?;
        Ok(sent.len() as u64)
    }

    /// The last of a connection whose answer must still be read: a client that is sending sees
    /// a reset, and not the answer, if it is closed at once (RFC 9112 section 9.6).
    fn linger(mut self) {
        self.socket.until = Instant::now() + LINGER_TIME;
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut self.socket).is_ok() {}
        }
        let _ = self.socket.tcp.shutdown(Shutdown::Write);
        let mut drained = 0;
        let mut chunk = [0; 4096];
        while drained < LINGER_SIZE {
            match self.socket.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => drained += count,
            }
        }
    }
}

/// A request body on its way up, by its framing.
enum Upload {
    Done,
    Sized(u64),
    Chunked(Chunked),
}

impl Exchange {
    fn new(stream: Stream, facts: Facts, peer: SocketAddr, started: Instant) -> Exchange {
        let upload = match facts.framing {
            Framing::Empty | Framing::Sized(0) => Upload::Done,
            Framing::Sized(length) => Upload::Sized(length),
            Framing::Chunked => Upload::Chunked(Chunked::default()),
        };
        Exchange {
            stream,
            facts,
            peer,
            started,
            upload,
            received: 0,
            waited: Duration::ZERO,
            fault: None,
        }
    }

    fn unread(&self) -> bool {
        !matches!(self.upload, Upload::Done)
    }

    /// Reads the body into memory, whole if it is small. A large one that says its size is not
    /// read at all; of one that does not, its beginning.
    fn hold(&mut self) -> Result<Vec<u8>, Fault> {
        let capacity = match self.upload {
            Upload::Sized(length) if length > HELD_SIZE as u64 => return Ok(Vec::new()),
            Upload::Sized(length) => length as usize,
            _ => 0,
        };
        let mut held = Vec::with_capacity(capacity);
        match self.by_ref().take(HELD_SIZE as u64).read_to_end(&mut held) {
            Ok(_) => Ok(held),
            Err(e) => Err(self
                .fault
                .take()
                .unwrap_or_else(|| Fault::Broken(e.to_string()))),
        }
    }

    fn read_upload(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.facts.expect) {
            self.stream.write_piece(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        // Only the time spent waiting for the client counts against it.
        let earned = Duration::from_millis(self.received * 1000 / u64::from(BODY_RATE));
        let began = Instant::now();
        self.stream.socket.until = began + (BODY_GRACE + earned).saturating_sub(self.waited);
        let count = match &mut self.upload {
            Upload::Done => return Ok(0),
            Upload::Sized(left) => {
                let room = (*left).min(out.len() as u64) as usize;
                let count = self.stream.read(&mut out[..room])?;
                *left -= count as u64;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if *left == 0 {
                    self.upload = Upload::Done;
                }
                count
            }
            Upload::Chunked(chunked) => {
                let count = chunked.read(&mut self.stream, out)?;
                if chunked.done {
                    self.upload = Upload::Done;
                }
                count
            }
        };
        self.waited += began.elapsed();
        self.received += count as u64;
        Ok(count)
    }
}

/// The body, decoded. An error leaves its reason in `fault`, since ureq shows only its own.
impl Read for Exchange {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        let fault = match self.read_upload(out) {
            Ok(_) if self.received > BODY_SIZE => Refusal::body_too_large().into(),
            Ok(count) => return Ok(count),
            Err(e) => match e.kind() {
                io::ErrorKind::TimedOut => Refusal::body_too_slow().into(),
                io::ErrorKind::InvalidData => Refusal::malformed(&e.to_string()).into(),
                _ => Fault::Broken("the client went away while it sent the body".into()),
            },
        };
        self.fault = Some(fault);
        Err(io::Error::other("the request body broke off"))
    }
}

/// Decodes a chunked body (RFC 9112 section 7.1), strictly: CRLF only, trailers checked and
/// dropped. Whatever is wrong is `InvalidData`.
#[derive(Debug, Default)]
struct Chunked {
    /// Of the present chunk.
    left: u64,
    begun: bool,
    done: bool,
}

impl Chunked {
    fn read(&mut self, source: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.done {
            if self.begun && !chunk_line(source)?.is_empty() {
                return Err(invalid("a chunk is longer than its size"));
            }
            self.begun = true;
            self.left = chunk_size(&chunk_line(source)?)?;
            if self.left == 0 {
                trailers(source)?;
                self.done = true;
            }
        }
        if self.done {
            return Ok(0);
        }
        let available = source.fill_buf()?;
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = available
            .len()
            .min(out.len())
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        out[..count].copy_from_slice(&available[..count]);
        source.consume(count);
        self.left -= count as u64;
        Ok(count)
    }
}

fn trailers(source: &mut impl BufRead) -> io::Result<()> {
    for _ in 0..FIELD_COUNT {
        let line = chunk_line(source)?;
        if line.is_empty() {
            return Ok(());
        }
        field(&line).map_err(|refusal| invalid(&refusal.message))?;
    }
    Err(invalid("there are too many trailer fields"))
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn chunk_line(source: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    source.take(LINE_SIZE as u64).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let text = line
        .strip_suffix(b"\r\n")
        .filter(|text| text.iter().all(|b| matches!(b, b'\t' | b' '..=b'~')));
    let text = text.ok_or_else(|| {
        invalid("a line between chunks is not ended by CRLF, too long, or not plain")
    })?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// A size in hexadecimal, and perhaps extensions, which are dropped.
fn chunk_size(line: &str) -> io::Result<u64> {
    let size = line.split(';').next().unwrap_or_default();
    let plain = !size.is_empty() && size.bytes().all(|b| b.is_ascii_hexdigit());
    let size = plain.then(|| u64::from_str_radix(size, 16).ok()).flatten();
    size.ok_or_else(|| invalid("a chunk's size is not a hexadecimal number"))
}

/// How the end of an answer shows.
#[derive(PartialEq)]
enum Delivery {
    NoBody,
    Sized,
    Chunked,
    Close,
}

/// Passes the answer down as it comes: each piece is written at once.
fn relay(
    answer: http::Response<ureq::Body>,
    exchange: &mut Exchange,
    access: &mut Access,
) -> Result<(), Fault> {
    let (parts, body) = answer.into_parts();
    debug!(
        "peer={} answer {}",
        access.peer,
        shown(
            parts
                .headers
                .iter()
                .map(|(n, v)| (n.as_str(), v.to_str().unwrap_or("?")))
        )
    );
    let (head, delivery) = answer_head(&parts, &access.method, &mut exchange.facts);
    let client_gone = |e: io::Error| match e.kind() {
        io::ErrorKind::TimedOut => Fault::Broken(format!(
            "the client took no data for {}s",
            PIECE_TIME.as_secs()
        )),
        _ => Fault::Broken(format!("the client went away: {e}")),
    };
    access.status = parts.status.as_u16();
    access.request_id = parts
        .headers
        .get("request-id")
        .or(parts.headers.get("x-request-id"))
        .cloned();
    exchange.stream.write_piece(&head).map_err(client_gone)?;
    access.first = Some(exchange.started.elapsed());
    if delivery == Delivery::NoBody {
        return Ok(());
    }
    // A chunk's size goes before the piece and CRLF behind it, so that it is one write.
    const SIZE: usize = "4000\r\n".len();
    let mut piece = vec![0; SIZE + PIECE_SIZE + 2];
    let mut reader = body.into_reader();
    loop {
        let count = reader
            .read(&mut piece[SIZE..SIZE + PIECE_SIZE])
            .map_err(upstream_broke)?;
        if count == 0 {
            break;
        }
        let mut range = SIZE..SIZE + count;
        if delivery == Delivery::Chunked {
            let size = format!("{count:04x}\r\n");
            piece[..SIZE].copy_from_slice(size.as_bytes());
            piece[range.end..range.end + 2].copy_from_slice(b"\r\n");
            range = 0..range.end + 2;
        }
        exchange
            .stream
            .write_piece(&piece[range])
            .map_err(client_gone)?;
        access.bytes += count as u64;
    }
    if delivery == Delivery::Chunked {
        exchange
            .stream
            .write_piece(b"0\r\n\r\n")
            .map_err(client_gone)?;
    }
    Ok(())
}

fn upstream_broke(e: io::Error) -> Fault {
    Fault::Broken(match ureq::Error::from(e) {
        ureq::Error::Timeout(_) => "upstream was silent for stream_idle_timeout".into(),
        e => format!("upstream broke off: {e}"),
    })
}

/// The answer's head: status and end-to-end fields, framed anew.
fn answer_head(
    parts: &http::response::Parts,
    method: &str,
    facts: &mut Facts,
) -> (Vec<u8>, Delivery) {
    let list = |name| {
        parts
            .headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
    };
    let nominated: Vec<String> = list("connection")
        .flat_map(|v| v.split(','))
        .map(|n| n.trim().to_ascii_lowercase())
        .collect();
    let status = parts.status.as_u16();
    let chunked = parts.headers.contains_key(http::header::TRANSFER_ENCODING);
    let length = parts
        .headers
        .get(http::header::CONTENT_LENGTH)
        .filter(|_| !chunked && status != 204);
    let delivery = match (
        method == "HEAD" || matches!(status, 204 | 304),
        length.is_some(),
        facts.http10,
    ) {
        (true, ..) => Delivery::NoBody,
        (_, true, _) => Delivery::Sized,
        (_, _, false) => Delivery::Chunked,
        (_, _, true) => Delivery::Close,
    };
    facts.close |= delivery == Delivery::Close;
    let mut head = format!(
        "HTTP/1.1 {status} {}\r\n",
        parts.status.canonical_reason().unwrap_or_default()
    )
    .into_bytes();
    let mut add = |name: &str, value: &[u8]| {
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            head.extend_from_slice(part);
        }
    };
    for (name, value) in &parts.headers {
        let name = name.as_str();
        if !is_connection_field(name) && !nominated.iter().any(|n| n == name) {
            add(name, value.as_bytes());
        }
    }
    if let Some(length) = length {
        add("content-length", length.as_bytes());
    }
    if delivery == Delivery::Chunked {
        add("transfer-encoding", b"chunked");
    }
    if facts.close {
        add("connection", b"close");
    }
    head.extend_from_slice(b"\r\n");
    (head, delivery)
}

/// What an answer does not carry further: fields of its connection, and two that would bind the
/// client to upstream.
fn is_connection_field(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "content-length"
            | "set-cookie"
            | "alt-svc"
    ) || name.starts_with("proxy-")
}

// ─── config ──────────────────────────────────────────────────────────────────────────────────
// In: the configuration file. Out: a `Config` that cannot be wrong, or one line that names the
// file, the field, what was found and what would be right; what was found is not shown where it
// could be a secret.

struct Config {
    listen: String,
    state_dir: PathBuf,
    log_level: LevelFilter,
    providers: Vec<ProviderSettings>,
    users: Vec<User>,
    request_timeout: Duration,
    stream_idle_timeout: Duration,
    refresh_check_interval: Duration,
    workers: usize,
    proxy: Option<ureq::Proxy>,
    tls: Option<TlsFiles>,
}

#[derive(Clone)]
struct ProviderSettings {
    provider: &'static Provider,
    headers: Vec<(HeaderName, HeaderValue)>,
    base_url: String,
    token_url: String,
}

#[derive(Clone)]
struct User {
    name: String,
    token: Secret,
}

#[derive(Clone)]
struct TlsFiles {
    cert: PathBuf,
    key: PathBuf,
}

/// The file as written.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Raw {
    listen: Option<String>,
    state_dir: Option<String>,
    log_level: Option<String>,
    providers: Option<Vec<RawEntry>>,
    users: Option<Vec<RawUser>>,
    request_timeout: Option<RawDuration>,
    stream_idle_timeout: Option<RawDuration>,
    refresh_check_interval: Option<RawDuration>,
    workers: Option<u32>,
    proxy: Option<RawSecret>,
    tls: Option<RawTls>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProvider {
    name: String,
    #[serde(default)]
    headers: Option<HashMap<String, RawSecret>>,
    #[serde(default)]
    base_url: Option<String>,
    #[serde(default)]
    token_url: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    name: String,
    token: Option<RawSecret>,
    token_file: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawTls {
    enabled: bool,
    cert_path: Option<String>,
    key_path: Option<String>,
}

/// A provider's entry: its name, or the long form.
struct RawEntry(RawProvider);

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawEntry, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RawEntry;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a provider's name, or a map with `name`")
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<RawEntry, E> {
                Ok(RawEntry(RawProvider {
                    name: name.into(),
                    ..RawProvider::default()
                }))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RawEntry, A::Error> {
                RawProvider::deserialize(de::value::MapAccessDeserializer::new(map)).map(RawEntry)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// `60s`, `1h30m`, `1.5h`, `500ms`, or a whole number of seconds.
struct RawDuration(Duration);

impl<'de> Deserialize<'de> for RawDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawDuration, D::Error> {
        let value = serde_yaml::Value::deserialize(deserializer)?;
        let duration = match &value {
            serde_yaml::Value::Number(n) => n.as_u64().map(Duration::from_secs),
            serde_yaml::Value::String(text) => humantime::parse_duration(text).ok(),
            _ => None,
        };
        let found = || serde_yaml::to_string(&value).unwrap_or_default();
        let wrong = || {
            format!(
                "found {}, expected a duration such as 60s, 10m, 1h30m, or seconds",
                found().trim()
            )
        };
        duration
            .map(RawDuration)
            .ok_or_else(|| de::Error::custom(wrong()))
    }
}

/// A string that no message shows.
struct RawSecret(String);

impl<'de> Deserialize<'de> for RawSecret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawSecret, D::Error> {
        match serde_yaml::Value::deserialize(deserializer)? {
            serde_yaml::Value::String(text) => Ok(RawSecret(text)),
            _ => Err(de::Error::custom("expected a string, in quotes if need be")),
        }
    }
}

impl Config {
    fn load(path: Option<&Path>) -> Result<Config, Error> {
        let Some(path) = path else {
            return Config::check(Raw::default()).map_err(Error::config);
        };
        let wrong = |what: String| Error::config(format!("{}: {what}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| wrong(format!("read: {e}")))?;
        let value: serde_yaml::Value = match path.extension().is_some_and(|e| e == "json") {
            true => serde_json::from_str(&text).map_err(|e| wrong(format!("not JSON: {e}")))?,
            false => serde_yaml::from_str(&text).map_err(|e| wrong(format!("not YAML: {e}")))?,
        };
        if value.is_null() {
            return Config::check(Raw::default()).map_err(wrong);
        }
        let raw = serde_path_to_error::deserialize(value).map_err(|e| wrong(misfit(&e)))?;
        Config::check(raw).map_err(wrong)
    }

    fn check(raw: Raw) -> Result<Config, String> {
        let seconds = Duration::from_secs;
        let listen = raw.listen.unwrap_or_else(|| ":8080".into());
        let port = listen
            .rsplit_once(':')
            .filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
        if port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            return Err(misfound("listen", &listen, "\":PORT\" or \"HOST:PORT\""));
        }
        let log_level = match raw.log_level.as_deref().unwrap_or("info") {
            "debug" => LevelFilter::Debug,
            "info" => LevelFilter::Info,
            "warn" => LevelFilter::Warn,
            "error" => LevelFilter::Error,
            other => return Err(misfound("log_level", other, "debug, info, warn or error")),
        };
        let workers = raw.workers.unwrap_or(64);
        if !(1..=4096).contains(&workers) {
            return Err(misfound("workers", &workers.to_string(), "1 to 4096"));
        }
        let proxy = raw.proxy.map(|url| match ureq::Proxy::new(&url.0) {
            Ok(proxy) if url.0.contains("://") => Ok(proxy),
            _ => Err("proxy: no proxy URL (not shown), expected http://HOST:PORT, socks5://HOST:PORT or the like"),
        });
        let check = |field, raw: Option<RawDuration>, least, default| match raw {
            None => Ok(default),
            Some(RawDuration(d)) if d >= least && d <= seconds(365 * 86400) => Ok(d),
            Some(RawDuration(d)) => {
                let found = humantime::format_duration(d).to_string();
                let least = humantime::format_duration(least);
                Err(misfound(field, &found, &format!("{least} to 365days")))
            }
        };
        let millisecond = Duration::from_millis(1);
        Ok(Config {
            listen,
            state_dir: expand("state_dir", raw.state_dir.as_deref().unwrap_or("~/.ai-mux"))?,
            log_level,
            providers: check_providers(raw.providers.unwrap_or_default())?,
            users: check_users(raw.users.unwrap_or_default())?,
            request_timeout: check(
                "request_timeout",
                raw.request_timeout,
                millisecond,
                seconds(60),
            )?,
            stream_idle_timeout: check(
                "stream_idle_timeout",
                raw.stream_idle_timeout,
                millisecond,
                seconds(300),
            )?,
            refresh_check_interval: check(
                "refresh_check_interval",
                raw.refresh_check_interval,
                seconds(1),
                seconds(600),
            )?,
            workers: workers as usize,
            proxy: proxy.transpose()?,
            tls: check_tls(raw.tls.unwrap_or_default())?,
        })
    }

    /// Those configured, or, where none is, those that have a credential file.
    fn providers(&self) -> Result<Vec<ProviderSettings>, Error> {
        if !self.providers.is_empty() {
            return Ok(self.providers.clone());
        }
        let path = |provider: &Provider| provider.path(&self.state_dir);
        let found: Vec<_> = PROVIDERS
            .iter()
            .filter(|p| path(p).exists())
            .map(ProviderSettings::default_of)
            .collect();
        if found.is_empty() {
            let looked: Vec<_> = PROVIDERS
                .iter()
                .map(|p| path(p).display().to_string())
                .collect();
            return Err(Error::start(format!(
                "no login found: neither {}; log in as README says, or name `providers` to start without",
                looked.join(" nor ")
            )));
        }
        Ok(found)
    }
}

fn misfound(field: &str, found: &str, right: &str) -> String {
    format!("{field}: found {found:?}, expected {right}")
}

/// A value of the wrong type, or a field that is unknown. serde's message ends in what was
/// expected; what was found stays out where it could be a secret that slipped.
fn misfit(error: &serde_path_to_error::Error<serde_yaml::Error>) -> String {
    let (path, message) = (error.path().to_string(), error.inner().to_string());
    let secret = path == "."
        || path.starts_with("users")
        || path.starts_with("proxy")
        || path.contains("headers");
    match message.find("expected") {
        Some(at) if secret => format!("{path}: what was found is not shown, {}", &message[at..]),
        None if secret && !message.starts_with("missing field") => {
            format!("{path}: not as it should be (not shown)")
        }
        _ => format!("{path}: {message}"),
    }
}

fn expand(field: &str, path: &str) -> Result<PathBuf, String> {
    match (path.strip_prefix('~'), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            Ok(PathBuf::from(home).join(rest.trim_start_matches('/')))
        }
        (Some(_), _) => Err(misfound(field, path, "a path, or ~/PATH with HOME set")),
        (None, _) if path.is_empty() => Err(misfound(field, path, "a path")),
        (None, _) => Ok(PathBuf::from(path)),
    }
}

fn check_providers(entries: Vec<RawEntry>) -> Result<Vec<ProviderSettings>, String> {
    let mut checked: Vec<ProviderSettings> = Vec::new();
    for (index, RawEntry(raw)) in entries.into_iter().enumerate() {
        let at = |field: &str| format!("providers[{index}].{field}");
        let Some(provider) = PROVIDERS.iter().find(|p| p.name == raw.name) else {
            return Err(misfound(&at("name"), &raw.name, "claude or chatgpt"));
        };
        if checked
            .iter()
            .any(|other| other.provider.name == provider.name)
        {
            return Err(misfound(&at("name"), &raw.name, "each provider once"));
        }
        let mut settings = ProviderSettings::default_of(provider);
        for (name, value) in raw.headers.unwrap_or_default() {
            let field = at(&format!("headers.{name}"));
            let parsed = HeaderName::from_bytes(name.as_bytes())
                .ok()
                .filter(|n| !is_reserved(n.as_str()));
            let parsed =
                parsed.ok_or_else(|| format!("{field}: not a header that may be set here"))?;
            let value = HeaderValue::from_str(&value.0);
            let value = value.map_err(|_| {
                format!("{field}: the value (not shown) has a character that headers cannot have")
            })?;
            settings.headers.push((parsed, value));
        }
        for (field, raw, url) in [
            ("base_url", raw.base_url, &mut settings.base_url),
            ("token_url", raw.token_url, &mut settings.token_url),
        ] {
            if let Some(raw) = raw {
                *url = check_url(&at(field), &raw)?;
            }
        }
        checked.push(settings);
    }
    Ok(checked)
}

impl ProviderSettings {
    fn default_of(provider: &'static Provider) -> ProviderSettings {
        let (base_url, token_url) = (provider.base_url.into(), provider.token_url.into());
        ProviderSettings {
            provider,
            headers: Vec::new(),
            base_url,
            token_url,
        }
    }
}

fn check_url(field: &str, url: &str) -> Result<String, String> {
    let right = "https://HOST/PATH, or http:// to a loopback address, without user or query";
    let parsed: Option<http::Uri> = url.parse().ok();
    let fine = parsed.is_some_and(|uri| {
        let plain = uri.authority().is_some_and(|a| !a.as_str().contains('@'))
            && uri.query().is_none()
            && !url.contains('#');
        plain
            && (uri.scheme_str() == Some("https")
                || uri.scheme_str() == Some("http") && is_loopback(&uri))
    });
    // A URL with a user in it has a password in it.
    let found = if url.contains('@') {
        "(not shown)"
    } else {
        url
    };
    if fine {
        Ok(url.trim_end_matches('/').to_owned())
    } else {
        Err(misfound(field, found, right))
    }
}

fn check_users(users: Vec<RawUser>) -> Result<Vec<User>, String> {
    let mut checked: Vec<User> = Vec::new();
    for (index, raw) in users.into_iter().enumerate() {
        let at = |field: &str| format!("users[{index}].{field}");
        if raw.name.is_empty() || raw.name == "-" || raw.name.chars().any(char::is_control) {
            return Err(misfound(&at("name"), &raw.name, "a name"));
        }
        let (field, token) = match (raw.token, raw.token_file) {
            (Some(RawSecret(token)), None) => (at("token"), token),
            (None, Some(path)) => {
                let path = expand(&at("token_file"), &path)?;
                let read = fs::read_to_string(&path);
                let text = read
                    .map_err(|e| format!("{}: read {}: {e}", at("token_file"), path.display()))?;
                (at("token_file"), text.trim().to_owned())
            }
            _ => {
                return Err(format!(
                    "users[{index}]: expected `token` or `token_file`, and not both"
                ));
            }
        };
        let token = Secret::new(&token).filter(|t| t.expose().len() >= 16);
        let token = token.ok_or_else(|| format!("{field}: expected at least 16 characters, visible ASCII (what was found is not shown)"))?;
        if checked.iter().any(|other| other.name == raw.name) {
            return Err(misfound(&at("name"), &raw.name, "each name once"));
        }
        if checked.iter().any(|other| other.token == token) {
            return Err(format!(
                "{field}: the same token as another user's, expected one for each"
            ));
        }
        checked.push(User {
            name: raw.name,
            token,
        });
    }
    Ok(checked)
}

fn check_tls(raw: RawTls) -> Result<Option<TlsFiles>, String> {
    if !raw.enabled {
        return Ok(None);
    }
    let path = |field: &str, path: Option<String>| {
        let path =
            path.ok_or_else(|| format!("{field}: not given, expected the path of a PEM file"))?;
        expand(field, &path)
    };
    let files = TlsFiles {
        cert: path("tls.cert_path", raw.cert_path)?,
        key: path("tls.key_path", raw.key_path)?,
    };
    files
        .load()
        .map(|_| Some(files))
        .map_err(|e| format!("tls: {e}"))
}

impl TlsFiles {
    fn load(&self) -> Result<Arc<CertifiedKey>, String> {
        let (cert, key) = (self.cert.display(), self.key.display());
        let pem = fs::read(&self.cert).map_err(|e| format!("cert_path: read {cert}: {e}"))?;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let chain = chain.map_err(|e| format!("cert_path: {cert}: {e}"))?;
        if chain.is_empty() {
            return Err(format!(
                "cert_path: {cert} holds no certificate, expected PEM"
            ));
        }
        let pem = fs::read(&self.key).map_err(|e| format!("key_path: read {key}: {e}"))?;
        // The parser's error could quote the key.
        let der = PrivateKeyDer::from_pem_slice(&pem);
        let der = der.map_err(|_| {
            format!("key_path: {key} holds no private key, expected PEM: PKCS#8, PKCS#1 or SEC1")
        })?;
        let pair = CertifiedKey::from_der(chain, der, &rustls::crypto::ring::default_provider());
        pair.map(Arc::new)
            .map_err(|e| format!("{cert} and {key} are no pair: {e}"))
    }
}

// ─── errors ──────────────────────────────────────────────────────────────────────────────────
// A `Refusal` is what a client hears, an `Error` what the operator reads when it cannot start.

struct Error {
    code: u8,
    message: String,
}

impl Error {
    fn start(message: String) -> Error {
        Error { code: 1, message }
    }

    fn config(message: String) -> Error {
        Error { code: 2, message }
    }
}

/// An error of ai-mux's own, in the shape that both vendors' SDKs show.
#[derive(Debug)]
struct Refusal {
    status: u16,
    /// Anthropic's word for this kind of error.
    kind: &'static str,
    code: &'static str,
    message: String,
    retry_after: Option<Duration>,
    /// Trying again cannot help: without `x-should-retry: false`, SDKs do so for minutes.
    hopeless: bool,
}

impl Refusal {
    fn new(status: u16, kind: &'static str, code: &'static str, message: String) -> Refusal {
        Refusal {
            status,
            kind,
            code,
            message,
            retry_after: None,
            hopeless: false,
        }
    }

    fn hopeless(self) -> Refusal {
        Refusal {
            hopeless: true,
            ..self
        }
    }

    fn malformed(why: &str) -> Refusal {
        Refusal::new(
            400,
            "invalid_request_error",
            "malformed_request",
            format!("malformed request: {why}"),
        )
        .hopeless()
    }

    fn no_token() -> Refusal {
        let message = "no token: send the one that ai-mux is configured with, as \"Authorization: Bearer TOKEN\" or \"x-api-key: TOKEN\"";
        Refusal::new(401, "authentication_error", "missing_token", message.into()).hopeless()
    }

    fn wrong_token() -> Refusal {
        let message = "wrong token: it is none of those that ai-mux is configured with; check the client's setting";
        Refusal::new(401, "authentication_error", "wrong_token", message.into()).hopeless()
    }

    fn origin() -> Refusal {
        let message = "web pages are not served: configure `users` in ai-mux and send a token";
        Refusal::new(
            403,
            "permission_error",
            "origin_not_allowed",
            message.into(),
        )
        .hopeless()
    }

    fn not_found() -> Refusal {
        let message = "no such path: ai-mux serves /claude/v1/... and /chatgpt/v1/..., for the providers it is configured with";
        Refusal::new(404, "not_found_error", "unknown_path", message.into()).hopeless()
    }

    fn head_too_slow() -> Refusal {
        let message = format!(
            "the request's head did not come within {}s; send it in one go",
            HEAD_TIME.as_secs()
        );
        Refusal::new(408, "timeout_error", "head_too_slow", message)
    }

    fn body_too_slow() -> Refusal {
        let message = format!(
            "the request's body came slower than {BODY_RATE} bytes/s; check the client's connection"
        );
        Refusal::new(408, "timeout_error", "body_too_slow", message)
    }

    fn body_too_large() -> Refusal {
        let message = format!(
            "the request's body is larger than {} MiB; send less",
            BODY_SIZE >> 20
        );
        Refusal::new(413, "request_too_large", "body_too_large", message).hopeless()
    }

    fn websocket() -> Refusal {
        let message = "WebSocket is not served here; use HTTP (Codex: supports_websockets=false)";
        Refusal::new(426, "invalid_request_error", "no_websocket", message.into()).hopeless()
    }

    fn head_too_large(what: &str, limit: usize) -> Refusal {
        let message = format!(
            "the request's head is too large: {what} is over {limit}; send fewer or shorter headers"
        );
        Refusal::new(431, "request_too_large", "head_too_large", message).hopeless()
    }

    fn internal() -> Refusal {
        Refusal::new(
            500,
            "api_error",
            "internal",
            "a fault of ai-mux; its log says more".into(),
        )
    }

    fn unreachable(provider: &str, e: &ureq::Error) -> Refusal {
        let message = format!("{provider} could not be reached, or broke off: {e}; try again");
        Refusal::new(502, "api_error", "upstream_unreachable", message)
    }

    fn busy(waited: Duration) -> Refusal {
        let message = format!(
            "all workers were busy for {}; try again, or raise `workers`",
            humantime::format_duration(waited)
        );
        Refusal {
            retry_after: Some(Duration::from_secs(1)),
            ..Refusal::new(503, "overloaded_error", "busy", message)
        }
    }

    fn no_login(why: &str) -> Refusal {
        Refusal::new(
            503,
            "api_error",
            "no_login",
            format!("ai-mux has no login to use: {why}"),
        )
        .hopeless()
    }

    fn no_token_yet(why: &str, wait: Duration) -> Refusal {
        let message = format!(
            "the login could not be refreshed: {why}; ai-mux tries again in {}s",
            wait.as_secs() + 1
        );
        let wait = Some(wait + Duration::from_secs(1));
        Refusal {
            retry_after: wait,
            ..Refusal::new(503, "api_error", "refresh_failed", message)
        }
    }

    fn too_slow(provider: &str, limit: Duration) -> Refusal {
        let limit = humantime::format_duration(limit);
        let message = format!(
            "{provider} did not answer within {limit}; try again, or raise `request_timeout`"
        );
        Refusal::new(504, "timeout_error", "upstream_too_slow", message)
    }

    fn headers(&self) -> String {
        let mut fields = String::new();
        match self.status {
            401 => fields.push_str("www-authenticate: Bearer\r\n"),
            426 => fields.push_str("upgrade: HTTP/1.1\r\n"),
            _ => {}
        }
        if let Some(wait) = self.retry_after {
            fields.push_str(&format!("retry-after: {}\r\n", wait.as_secs()));
        }
        if self.hopeless {
            fields.push_str("x-should-retry: false\r\n");
        }
        fields
    }

    fn body(&self) -> Vec<u8> {
        let error = serde_json::json!({
            "type": "error",
            "error": { "type": self.kind, "message": self.message, "param": null, "code": self.code },
        });
        error.to_string().into_bytes()
    }
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
    fn new(peer: SocketAddr, started: Instant) -> Access {
        let unknown = || "-".to_owned();
        let (user, method, path) = (unknown(), unknown(), unknown());
        let (first, request_id, ended) = (None, None, None);
        Access {
            peer,
            started,
            user,
            provider: "-",
            method,
            path,
            status: 0,
            bytes: 0,
            first,
            request_id,
            ended,
        }
    }

    fn refused(&mut self, refusal: &Refusal) {
        self.status = refusal.status;
        self.first = Some(self.started.elapsed());
        self.ended = Some(refusal.message.clone());
    }

    fn log(&self) {
        let millis = |d: Duration| format!("{}ms", d.as_millis());
        let quoted = self
            .user
            .contains([' ', '"', '='])
            .then(|| format!("{:?}", self.user));
        let mut line = format!(
            "peer={} user={} provider={} method={} path={} status={} bytes={} first={} total={}",
            self.peer,
            quoted.as_ref().unwrap_or(&self.user),
            self.provider,
            self.method,
            self.path.get(..200).unwrap_or(&self.path), // ASCII, as the gate has seen to
            self.status,
            self.bytes,
            self.first.map_or("-".into(), millis),
            millis(self.started.elapsed()),
        );
        if let Some(id) = self.request_id.as_ref().filter(|_| self.status >= 400) {
            let plain = id
                .to_str()
                .ok()
                .filter(|id| id.len() <= 128 && !id.contains([' ', '"']));
            line.push_str(&format!(" request-id={}", plain.unwrap_or("?")));
        }
        if let Some(why) = &self.ended {
            line.push_str(&format!(" ended={why:?}"));
        }
        info!("{line}");
    }
}

/// Header fields for the log: the names of all, the values of those that are known to hold
/// neither secrets nor anything personal.
fn shown<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let harmless = [
        "accept",
        "accept-encoding",
        "anthropic-beta",
        "anthropic-version",
        "cache-control",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "date",
        "request-id",
        "retry-after",
        "server",
        "transfer-encoding",
        "user-agent",
        "x-request-id",
        "x-should-retry",
    ];
    let mut text = String::new();
    for (name, value) in fields.filter(|(name, _)| *name != EXCHANGE) {
        let known = harmless.iter().any(|h| h.eq_ignore_ascii_case(name));
        let known = known || name.starts_with("anthropic-ratelimit-");
        let value = if known {
            format!("{value:?}")
        } else {
            format!("({} bytes)", value.len())
        };
        text.push_str(&format!("{name}: {value}, "));
    }
    text.trim_end_matches(", ").to_owned()
}

/// simple_logger, but for two things: the time, where the journal does not write it, and a
/// standard error that nobody reads any more, on which it panics.
struct Log {
    logger: simple_logger::SimpleLogger,
    timed: bool,
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let _ = catch_unwind(AssertUnwindSafe(|| match self.timed {
            true => {
                let time = humantime::format_rfc3339_seconds(SystemTime::now());
                let mut timed = log::Record::builder();
                timed.metadata(record.metadata().clone());
                self.logger
                    .log(&timed.args(format_args!("{time} {}", record.args())).build());
            }
            false => self.logger.log(record),
        }));
    }

    fn flush(&self) {}
}

fn start_log(level: LevelFilter) {
    let mut logger = simple_logger::SimpleLogger::new().with_level(level);
    // At lower levels these print heads with tokens in them.
    for noisy in ["ureq", "rustls", "tiny_http"] {
        logger = logger.with_module_level(noisy, level.min(LevelFilter::Warn));
    }
    // A panic's message could hold anything; its place is enough. Not eprintln!, see above.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        if !place.contains("stdio.rs") {
            let _ = writeln!(io::stderr(), "ERROR [ai_mux] panic at {place}");
        }
    }));
    log::set_max_level(level);
    let timed = std::env::var_os("JOURNAL_STREAM").is_none();
    // Fails only if there is one already, as when a test runs this twice.
    let _ = log::set_boxed_logger(Box::new(Log { logger, timed }));
}

// ─── secret ──────────────────────────────────────────────────────────────────────────────────

mod secret {
    //! A token that can be read in one way only.

    use std::fmt;
    use std::sync::Arc;

    #[derive(Clone, PartialEq, Eq)]
    pub struct Secret(Arc<str>);

    impl Secret {
        /// `None` for what cannot stand in a header: nothing, or more than visible ASCII.
        pub fn new(text: &str) -> Option<Secret> {
            let fine = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
            fine.then(|| Secret(text.into()))
        }

        pub fn expose(&self) -> &str {
            &self.0
        }
    }

    impl fmt::Debug for Secret {
        fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("Secret")
        }
    }
}
