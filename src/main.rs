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
//! credential file <── worker or keeper, one at a time ──> token endpoint
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
use std::fmt::Display;
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{LevelFilter, debug, error, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serde_yaml::Value as Yaml;
use subtle::ConstantTimeEq;
use tiny_http::Request;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, TRANSFER_ENCODING};
use ureq::http::{self, HeaderMap, HeaderName, HeaderValue};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport,
};
use ureq::{SendBody, tls::RootCerts};

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
/// How long a connection must have been idle to make room: its thread may be about to wake.
const IDLE_MIN: Duration = Duration::from_millis(100);
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
/// New connections that the kernel may queue for us; it resets some beyond that.
const BACKLOG: i32 = 4096;
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

const VERSION: &str = concat!("ai-mux ", env!("CARGO_PKG_VERSION"), "\n");
const HELP: &str = "\
ai-mux: your own Claude or ChatGPT subscription, from all your own devices

usage: ai-mux [--config PATH]

  --config PATH   configuration, YAML, or JSON when PATH ends in .json; without it, all defaults
  --help          this text
  --version       the version
";

#[cfg_attr(test, allow(dead_code))]
fn main() -> ExitCode {
    let Err(Error(code, message)) = run() else {
        return ExitCode::SUCCESS;
    };
    // Not eprintln!, which panics when nobody reads standard error.
    let _ = writeln!(io::stderr(), "ai-mux: {message}");
    ExitCode::from(code)
}

fn run() -> Result<(), Error> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(|a| a.to_str()).collect();
    let path = match words[..] {
        [] => None,
        [Some("--config"), _] => Some(Path::new(&arguments[1])),
        [Some("--help")] => return print(HELP),
        [Some("--version")] => return print(VERSION),
        _ => return Err(Error::config("expected --config PATH; see --help")),
    };
    let config = Config::load(path)?;
    start_log(config.log_level);
    let signal = signals().map_err(|e| Error::start("register for signals", e))?;
    let _claim = claim(&config.state_dir)?;
    let gate = Gate::open(&config)?;
    let listeners = listen(&config)?;
    let keepers = gate.proxy.start_keepers(config.refresh_check_interval);
    let keepers = keepers.map_err(|e| Error::start("start a thread", e))?;
    gate.accept(listeners, &signal);

    info!("stopping, once running requests and refreshes have ended");
    let deadline = Instant::now() + STOP_TIME;
    gate.drain(Instant::now() + DRAIN_TIME);
    gate.proxy.stop_keepers(keepers, deadline);
    info!("stopped");
    Ok(())
}

fn print(text: &str) -> Result<(), Error> {
    let printed = io::stdout().write_all(text.as_bytes());
    printed.map_err(|e| Error::start("print", e))
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
fn claim(folder: &Path) -> Result<File, Error> {
    let what = format!("state_dir {}", folder.display());
    let created = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    let opened = created.and_then(|()| File::open(folder));
    let claim = opened.map_err(|e| Error::start(&what, e))?;
    let locked = claim.try_lock().map(|()| claim);
    locked.map_err(|e| Error::start(what, format!("another ai-mux uses it ({e})")))
}

/// Takes a lock whatever a panicking thread left behind: every state here is valid after each
/// statement. Nothing is waited for while a lock is held, but for a credential's `turn`, and for a proof.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
    let outcome = condvar.wait_timeout(guard, time);
    outcome.unwrap_or_else(PoisonError::into_inner).0
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().stack_size(STACK_SIZE);
    thread.name(name.into()).spawn(work)
}

// ─── gate ────────────────────────────────────────────────────────────────────────────────────
// In: client connections. Out: to tiny_http, heads that are well-formed and unambiguous, each
// with its exchange parked; to the client, only what is decided without a worker: a malformed
// head, a health answer, a full pool. No body passes here but what is drained after a reply.

#[derive(Default)]
struct Gate {
    proxy: Proxy,
    /// A certificate's files, how they looked when last read, and what TLS makes of them.
    files: Option<TlsFiles>,
    seen: Mutex<Option<[Option<Stamp>; 2]>>,
    tls: Mutex<Option<Arc<rustls::ServerConfig>>>,
    /// How long a request waits for a permit: `request_timeout`.
    patience: Duration,
    /// How many connections there may be.
    capacity: usize,
    /// By number; touched when a connection comes, goes, or turns from idle to busy and back.
    connections: Mutex<HashMap<u64, Connection>>,
    /// A connection has gone.
    gone: Condvar,
    stopping: AtomicBool,
    /// The last number of a connection or an exchange.
    last: AtomicU64,
    /// Exchanges that no worker has picked up yet, by number.
    parked: Mutex<HashMap<u64, Parked>>,
    /// Where inner connections are made: `socket` in a private folder that ends with us.
    inner_folder: PathBuf,
    /// Inner connections not checked out, exactly `workers`; `None` is one still to be opened.
    permits: Mutex<Vec<Option<UnixStream>>>,
    /// Held until a new one is proven, for a burst of new ones would leave tiny_http dead to most
    /// of them (tiny_http 0.12, util/task_pool.rs: it counts waiting threads that have work).
    opening: Mutex<()>,
    /// A permit has come back.
    freed: Condvar,
}

/// What the gate remembers of a connection that some thread serves.
struct Connection {
    socket: Arc<TcpStream>,
    /// Since when no request of it is being served; `None` while one is.
    idle: Option<Instant>,
}

/// An exchange and its log line, with the only sender of its verdict. One without an exchange
/// proves an inner connection: that a worker took it is all it tells.
type Parked = (Option<(Exchange, Access)>, Sender<Verdict>);

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
    fn open(config: &Config) -> Result<Arc<Gate>, Error> {
        let failed = |e| Error::start("open the inner connections", e);
        let (workers, capacity) = descriptors(config.workers as u64);
        let (listener, inner_folder) = inner_listener(&config.state_dir).map_err(failed)?;
        let gate = Arc::new(Gate {
            proxy: Proxy::new(config)?,
            files: config.tls.clone(),
            patience: config.request_timeout,
            capacity,
            inner_folder,
            ..Gate::default()
        });
        gate.renew().map_err(Error::config)?;
        serve(listener, workers, &gate).map_err(failed)?;
        let first = gate.connect().map_err(failed)?;
        lock(&gate.permits).resize_with(workers - 1, || None);
        lock(&gate.permits).push(Some(first));
        Ok(gate)
    }

    /// Accepts connections until a signal comes: a thread for each, the longest idle one making
    /// room at the cap. While all are busy, or descriptors have run out, new ones wait in the
    /// listeners' queues.
    fn accept(self: &Arc<Gate>, listeners: Vec<TcpListener>, signal: &UnixStream) {
        for address in listeners.iter().filter_map(|l| l.local_addr().ok()) {
            if self.proxy.users.is_empty() && !address.ip().is_loopback() {
                warn!("no users configured: whoever reaches {address} uses your subscription");
            }
            let secure = if self.files.is_some() { "s" } else { "" };
            info!("listening on http{secure}://{address}");
        }
        let mut warned = false;
        let pause = self
            .files
            .as_ref()
            .and_then(|_| RENEWAL_CHECK.try_into().ok());
        loop {
            let mut sources = vec![PollFd::new(signal, PollFlags::IN)];
            sources.extend(listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)));
            let _ = poll(&mut sources, pause.as_ref()); // if interrupted, nothing is ready
            let mut ready = sources.iter().map(|s| !s.revents().is_empty());
            if ready.next() == Some(true) {
                return;
            }
            if let Err(e) = self.renew() {
                error!("{e}; the old certificate stays in use");
            }
            for (_, listener) in ready.zip(&listeners).filter(|(ready, _)| *ready) {
                match self.admit(listener) {
                    Ok(()) => warned = false,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {} // it has gone again
                    Err(e) => {
                        if !std::mem::replace(&mut warned, true) {
                            warn!("new connections wait: {e}");
                        }
                        self.close_idle(IDLE_MIN);
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
    }

    /// Takes the certificate from its files, where they are others than before.
    fn renew(&self) -> Result<(), String> {
        let stamps = self.files.as_ref().map(TlsFiles::stamps);
        let seen = std::mem::replace(&mut *lock(&self.seen), stamps);
        let Some(files) = self.files.as_ref().filter(|_| seen != stamps) else {
            return Ok(());
        };
        let pair = files.load().map_err(|e| format!("tls.{e}"))?;
        let pair = SingleCertAndKey::from(Arc::unwrap_or_clone(pair));
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let mut config = config.with_cert_resolver(Arc::new(pair));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        *lock(&self.tls) = Some(Arc::new(config));
        info!("tls: the certificate {} is in use", files.cert.display());
        Ok(())
    }

    fn admit(self: &Arc<Gate>, listener: &TcpListener) -> io::Result<()> {
        let full = lock(&self.connections).len() >= self.capacity;
        if full && self.close_idle(IDLE_MIN).is_none() {
            return Err(io::Error::other("all that there may be are busy"));
        }
        let (tcp, peer) = listener.accept()?;
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        tcp.set_nonblocking(false)?;
        tcp.set_nodelay(true)?;
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let (socket, idle) = (Arc::new(tcp), Some(Instant::now()));
        let shared = socket.clone();
        lock(&self.connections).insert(number, Connection { socket, idle });
        let gate = self.clone();
        let thread = spawn("client", move || {
            // After a panic the connection is closed, and its place free, as after any other end.
            let _ = catch_unwind(AssertUnwindSafe(|| gate.converse(number, shared, peer)));
            gate.forget(number);
        });
        thread.map(drop).inspect_err(|_| self.forget(number))
    }

    fn forget(&self, number: u64) {
        lock(&self.connections).remove(&number);
        self.gone.notify_all();
    }

    /// Shuts the longest idle connection; its thread then ends by itself. One that has been idle
    /// for less than `since`, or whose next request has come already, is not.
    fn close_idle(&self, since: Duration) -> Option<Connection> {
        let mut connections = lock(&self.connections);
        let idle = connections.iter().filter_map(|(n, c)| Some((c.idle?, *n)));
        let mut idle: Vec<_> = idle.filter(|(at, _)| at.elapsed() >= since).collect();
        idle.sort_unstable();
        let quiet = |(_, number): &&(Instant, u64)| {
            let source = PollFd::new(&*connections[number].socket, PollFlags::IN);
            poll(&mut [source], Some(&Timespec::default())) == Ok(0)
        };
        let (_, longest) = *idle.iter().find(quiet)?;
        let closed = connections.remove(&longest)?;
        let _ = closed.socket.shutdown(Shutdown::Both);
        Some(closed)
    }

    /// One client connection, from handshake to close: a head, an exchange, a verdict, again.
    fn converse(&self, number: u64, socket: Arc<TcpStream>, peer: SocketAddr) {
        let mut stream = Stream::new(socket);
        let tls = lock(&self.tls).clone();
        if let Some(Err(e)) = tls.map(|tls| stream.handshake(tls)) {
            return debug!("peer={peer} TLS handshake: {e}");
        }
        while self.turn(number, true) {
            let verdict = match stream.read_head() {
                Ok(Some(head)) if self.turn(number, false) => self.exchange(stream, head, peer),
                Ok(_) => return,
                Err(reply) => refuse(stream, Access::new(peer, "-", "-"), reply, true),
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
        let known = connections.get_mut(&number);
        known.map(|c| c.idle = idle.then(Instant::now)).is_some() && !stopping
    }

    /// One request: answered here, or by a worker to whom the stream is lent.
    fn exchange(&self, stream: Stream, head: Head, peer: SocketAddr) -> Verdict {
        let access = Access::new(peer, &head.method, path_of(&head.target));
        let last = head.close || head.framing != Framing::Empty;
        if head.is_health() {
            return refuse(stream, access, Reply::new(200, self.proxy.health()), last);
        }
        let Some(permit) = self.permit() else {
            let busy = Reply::new(503, "all workers are busy; raise `workers`, or wait");
            let busy = busy.retry_after(Duration::from_secs(1));
            return refuse(stream, access, busy, last);
        };
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let text = head.inner(number);
        let worker = self.park(number, Some((Exchange::new(stream, head), access)));
        let mut sent = self.send(permit, &text);
        let verdict = worker.recv_timeout(PICKUP_TIME).unwrap_or_else(|_| {
            // Late, not sent, or broken: if the exchange is gone, a worker has it.
            let parked = lock(&self.parked).remove(&number);
            let Some((Some((exchange, access)), _)) = parked else {
                return worker.recv().unwrap_or(Verdict::Broken);
            };
            error!("tiny_http lost a head ({sent:?}); its inner connection is replaced");
            sent = Err(ErrorKind::TimedOut.into());
            refuse(exchange.stream, access, Reply::internal(), last)
        });
        lock(&self.permits).push(sent.ok());
        self.freed.notify_one();
        verdict
    }

    /// A permit: an inner connection, and with it a worker's time.
    fn permit(&self) -> Option<Option<UnixStream>> {
        let deadline = Instant::now() + self.patience;
        let mut permits = lock(&self.permits);
        while permits.is_empty() && !left_until(deadline).is_zero() {
            permits = wait(&self.freed, permits, left_until(deadline));
        }
        permits.pop()
    }

    fn send(&self, permit: Option<UnixStream>, head: &str) -> io::Result<UnixStream> {
        let mut connection = permit.map_or_else(|| self.connect(), Ok)?;
        connection.write_all(head.as_bytes())?;
        Ok(connection)
    }

    fn park(&self, number: u64, lent: Option<(Exchange, Access)>) -> Receiver<Verdict> {
        let (sender, receiver) = mpsc::channel();
        lock(&self.parked).insert(number, (lent, sender));
        receiver
    }

    /// Opens an inner connection and proves it: a worker must pick up a head that came over it.
    fn connect(&self) -> io::Result<UnixStream> {
        let _opening = lock(&self.opening);
        let mut connection = UnixStream::connect(self.inner_folder.join("socket"))?;
        connection.set_write_timeout(Some(PICKUP_TIME))?;
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let taken = self.park(number, None);
        let head = format!("HEAD / HTTP/1.1\r\n{EXCHANGE}: {number}\r\n\r\n");
        connection.write_all(head.as_bytes())?;
        let _ = taken.recv_timeout(PICKUP_TIME); // there is no verdict, only an end
        let lost = lock(&self.parked).remove(&number);
        match lost {
            Some(_) => Err(io::Error::other("no worker picked a head up")),
            None => Ok(connection),
        }
    }

    /// Closes idle connections and waits for the busy ones.
    fn drain(&self, deadline: Instant) {
        self.stopping.store(true, Ordering::SeqCst);
        while self.close_idle(Duration::ZERO).is_some() {}
        let mut connections = lock(&self.connections);
        while !connections.is_empty() && !left_until(deadline).is_zero() {
            connections = wait(&self.gone, connections, left_until(deadline));
        }
        if !connections.is_empty() {
            warn!("{} requests still ran and are cut short", connections.len());
        }
        remove_inner(&self.inner_folder);
    }
}

/// The inner socket, in a private folder: in `state_dir`, or among the temporary ones where that
/// is read-only or its path too long for a socket address (107 bytes, unix(7)).
fn inner_listener(state_dir: &Path) -> io::Result<(UnixListener, PathBuf)> {
    let bind = |folder: PathBuf| {
        remove_inner(&folder); // left behind by kill -9
        DirBuilder::new().mode(0o700).create(&folder)?;
        let listener = UnixListener::bind(folder.join("socket"));
        let listener = listener.inspect_err(|_| remove_inner(&folder))?;
        Ok::<_, io::Error>((listener, folder))
    };
    let temporary = format!("ai-mux-{}", std::process::id());
    bind(state_dir.join("inner")).or_else(|_| bind(std::env::temp_dir().join(temporary)))
}

fn remove_inner(folder: &Path) {
    let _ = fs::remove_file(folder.join("socket"));
    let _ = fs::remove_dir(folder); // only if it is empty
}

/// Raises the descriptor limit if it may, and says what it carries: (workers, connections).
fn descriptors(wanted: u64) -> (usize, usize) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limits = getrlimit(Resource::Nofile);
    limits.current = limits.maximum;
    let _ = setrlimit(Resource::Nofile, limits); // what came of it, the next line tells
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let rest = limit.saturating_sub(SPARE_DESCRIPTORS);
    let workers = wanted.min(rest / (WORKER_DESCRIPTORS + 1)).max(1);
    if workers < wanted {
        warn!("the limit of {limit} open files carries {workers} workers, not {wanted}");
    }
    let rest = rest.saturating_sub(workers * WORKER_DESCRIPTORS).max(1);
    let capacity = rest.min(workers + SPARE_CONNECTIONS);
    (workers as usize, capacity as usize)
}

/// All listeners of `listen`: for `:PORT` both families, where one socket does not serve both.
fn listen(config: &Config) -> Result<Vec<TcpListener>, Error> {
    let failed = |e| Error::start(format!("listen on {}", config.listen), e);

    let any = config.listen.starts_with(':');
    let named = if any { "[::]" } else { "" }.to_owned() + &config.listen;
    let mut addresses: Vec<_> = named.to_socket_addrs().map_err(failed)?.collect();
    if any {
        addresses.push(([0, 0, 0, 0], addresses[0].port()).into()); // "[::]:PORT" is one address
    }
    let (mut listeners, mut port) = (Vec::new(), None);
    let mut outcome = Err(ErrorKind::NotFound.into());
    for mut address in addresses {
        address.set_port(port.unwrap_or(address.port()));
        outcome = TcpListener::bind(address).and_then(|listener| {
            rustix::net::listen(&listener, BACKLOG)?; // std asks for 128
            listener.set_nonblocking(true)?;
            port = Some(listener.local_addr()?.port());

            listeners.push(listener);
            Ok(())
        });
    }
    if listeners.is_empty() {
        outcome.map_err(failed)?;
    }
    Ok(listeners)
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
    host: bool,
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
/// The lines that ended before `from` have been looked at already.
fn head_end(bytes: &[u8], from: usize) -> Result<Option<usize>, Reply> {
    let before = bytes[..from].iter().rposition(|b| *b == b'\n');
    let mut end = before.map_or(0, |at| at + 1);
    for line in bytes[end..].split_inclusive(|b| *b == b'\n') {
        end += line.len();
        // Of the last one the end may still be to come.
        let ended = line.strip_suffix(b"\r\n");
        let text = ended.or(line.strip_suffix(b"\r")).unwrap_or(line);
        if !text.iter().all(|b| matches!(b, b'\t' | b' '..=b'~')) {
            return Err(malformed("not plain ASCII, or a bare CR or LF"));
        }
        if text.len() >= LINE_SIZE || end > HEAD_SIZE {
            return Err(head_too_large());
        }
        if ended == Some(b"") {
            return Ok(Some(end));
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
            Ok(_) => return Err(malformed("no request line")),
            Err(httparse::Error::TooManyHeaders) => return Err(head_too_large()),
            Err(e) => return Err(malformed(&e.to_string())),
        }
        let http10 = request.version == Some(0);
        let mut head = Head {
            method: request.method.unwrap_or_default().to_owned(),
            target: request.path.unwrap_or_default().to_owned(),
            http10,
            close: http10,
            ..Head::default()
        };
        for field in request.headers.iter() {
            let value = str::from_utf8(field.value).unwrap_or_default(); // ASCII: see head_end
            head.take(field.name, value.trim()).map_err(malformed)?;
        }
        head.check().map_err(malformed)?;
        head.expect &= head.has_body() && !http10;
        Ok(head)
    }

    /// Takes one field: to keep, or to act upon.
    fn take(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        let mut items = value.split(',').map(str::trim);
        let framed = self.framing != Framing::Empty;
        let chunked = value.eq_ignore_ascii_case("chunked");
        let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
        let hostly = |b: u8| b.is_ascii_alphanumeric() || b"-._~:[]%".contains(&b);
        match name.to_ascii_lowercase().as_str() {
            EXCHANGE => return Err("x-ai-mux-exchange is not for clients"),
            "content-length" | "transfer-encoding" if framed => return Err("two body lengths"),
            "content-length" if !digits => return Err("Content-Length is not a number"),
            "content-length" => self.framing = Framing::Sized(value.parse().unwrap_or(u64::MAX)),
            "transfer-encoding" if !chunked => return Err("Transfer-Encoding is not just chunked"),
            "transfer-encoding" => self.framing = Framing::Chunked,
            "connection" => {
                self.nominated.extend(items.map(str::to_ascii_lowercase));
                self.close |= self.nominated.iter().any(|name| name == "close");
            }
            "expect" => self.expect |= value.eq_ignore_ascii_case("100-continue"),
            "upgrade" => self.websocket |= items.any(|i| i.eq_ignore_ascii_case("websocket")),
            "host" if self.host || !value.bytes().all(hostly) => return Err("Host is not a host"),
            "host" => self.host = true, // upstream gets one of its own
            _ => self.fields.push((name.to_owned(), value.to_owned())),
        }
        Ok(())
    }

    /// What no single field can tell.
    fn check(&self) -> Result<(), &'static str> {
        let (method, target) = (self.method.as_str(), self.target.as_str());
        let capitals = method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
        // What http::Uri takes in a query; '#' would begin a fragment.
        let plain = |b| matches!(b, 0x21 | 0x24..=0x3b | 0x3d | 0x3f..=0x7e);
        match method {
            // TRACE would have the upstream send our token back to the client.
            "TRACE" | "CONNECT" => Err("the method is not one that can be passed on"),
            _ if !capitals || method.len() > 32 => Err("the method is none"),
            _ if !target.starts_with('/') => Err("the target is not a path; send no whole URL"),
            _ if !target.bytes().all(plain) => Err("the target must be percent-encoded"),
            _ if !self.host && !self.http10 => Err("there is no Host"),
            "HEAD" if self.has_body() => Err("a HEAD has no body"),
            _ if self.http10 && self.framing == Framing::Chunked => Err("HTTP/1.0 has no chunks"),
            _ => Ok(()),
        }
    }

    fn has_body(&self) -> bool {
        !matches!(self.framing, Framing::Empty | Framing::Sized(0))
    }

    /// What is answered without a token and without a worker.
    fn is_health(&self) -> bool {
        let path = path_of(&self.target);
        match self.method.as_str() {
            "GET" => path == "/healthz",
            "HEAD" => matches!(path, "/healthz" | "/" | "/claude" | "/chatgpt"),
            _ => false,
        }
    }

    /// The head as tiny_http gets it, written anew from checked parts, its number first.
    fn inner(&self, number: u64) -> String {
        let (method, target) = (&self.method, &self.target);
        let mut text = format!("{method} {target} HTTP/1.1\r\n{EXCHANGE}: {number}\r\n");
        for (name, value) in &self.fields {
            text.extend([name, ": ", value, "\r\n"]);
        }
        text + "\r\n"
    }
}

fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

// ─── server ──────────────────────────────────────────────────────────────────────────────────
// In: requests from tiny_http. Out: a verdict for each exchange, whatever happens to it, and its
// line in the access log. A panic in the handler ends here: it costs an answer, not a worker.

fn serve(listener: UnixListener, workers: usize, gate: &Arc<Gate>) -> io::Result<()> {
    let server = tiny_http::Server::from_listener(listener, None).map_err(io::Error::other)?;
    let server = Arc::new(server);
    for _ in 0..workers {
        let (server, gate) = (server.clone(), gate.clone());
        let work = move || loop {
            match server.recv() {
                Ok(request) => work(request, &gate),
                Err(e) => error!("tiny_http: {e}"),
            }
        };
        spawn("worker", work)?;
    }
    Ok(())
}

fn work(request: Request, gate: &Gate) {
    let first = request.headers().first();
    let number = first.filter(|h| h.field.equiv(EXCHANGE));
    let number: Option<u64> = number.and_then(|h| h.value.as_str().parse().ok());
    let parked = number.and_then(|number| lock(&gate.parked).remove(&number));
    if let Some((Some((mut exchange, mut access)), verdict)) = parked {
        let proxy = &gate.proxy;
        let outcome = fence(&mut access, |a| proxy.handle(&request, &mut exchange, a));
        let last = exchange.head.close || exchange.unread();
        // The gate may be gone with the program; then nobody needs the verdict.
        let _ = verdict.send(conclude(exchange.stream, access, outcome, last));
    }
    drop(request.into_writer());
}

/// Whether a request has its whole answer from upstream.
type Outcome = Result<(), Fault>;

/// Why it has not.
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
fn fence(access: &mut Access, work: impl FnOnce(&mut Access) -> Outcome) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| work(access))) {
        Ok(outcome) => outcome,
        Err(_) if access.status == 0 => Err(Reply::internal().into()),
        Err(_) => Err(Fault::Broken("a fault of ai-mux (panic)".into())),
    }
}

fn refuse(stream: Stream, access: Access, reply: Reply, last: bool) -> Verdict {
    conclude(stream, access, Err(reply.into()), last)
}

/// Says what is still to be said, writes the log line, and judges what becomes of the stream.
fn conclude(mut stream: Stream, mut access: Access, outcome: Outcome, mut last: bool) -> Verdict {
    let (ended, broken) = match outcome {
        Ok(()) => (None, false),
        Err(Fault::Broken(why)) => (Some(why), true),
        Err(Fault::Reply(reply)) => {
            last |= reply.status == 401;
            let (bytes, length) = reply.to_bytes(access.method == "HEAD", last);
            let sent = stream.write_piece(&bytes);
            (access.status, access.bytes) = (reply.status, length);
            access.first = Some(access.started.elapsed());
            let ended = Some(reply.message).filter(|_| reply.status != 200);
            (ended, sent.is_err())
        }
    };
    access.log(ended);
    match last {
        _ if broken => Verdict::Broken,
        true => Verdict::Linger(stream),
        false => Verdict::Next(stream),
    }
}

// ─── handler ─────────────────────────────────────────────────────────────────────────────────
// In: a request whose head is well-formed, and its exchange. Out: the answer, on the exchange's
// stream, or the fault. The order of the steps is the policy: nobody without a token learns
// which paths exist, and nothing is read or refreshed for a request that is refused anyway.

/// What stays the same while the program runs.
#[derive(Default)]
struct Proxy {
    users: Vec<User>,
    upstreams: Vec<Upstream>,
}

impl Proxy {
    fn new(config: &Config) -> Result<Proxy, Error> {
        let (users, network) = (config.users.clone(), Network::new(config)?);
        let settings = config.providers()?.into_iter();
        let upstreams = settings.map(|s| Upstream::new(s, config, &network));
        let upstreams = upstreams.collect();
        Ok(Proxy { users, upstreams })
    }

    fn handle(&self, request: &Request, exchange: &mut Exchange, access: &mut Access) -> Outcome {
        let fields = request.headers().iter();
        let fields = fields.map(|h| (h.field.as_str().as_str(), h.value.as_str()));
        debug!("peer={} request: {}", access.peer, shown(fields));
        access.user = self.authenticate(request.headers())?.to_owned();
        let (upstream, url) = self.route(request.url())?;
        access.provider = upstream.provider.name;
        if exchange.head.websocket {
            return Err(Reply::new(426, "no WebSocket here; use plain HTTP").into());
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

    /// The user's name. All tokens given must be one and the same, and a user's; the comparison
    /// takes as long for a token that is nearly right, and for every user.
    fn authenticate(&self, headers: &[tiny_http::Header]) -> Result<&str, Reply> {
        if self.users.is_empty() {
            // A web page must not use the subscription of whoever looks at it.
            let page = headers.iter().any(|h| h.field.equiv("origin"));
            let refused = || Reply::new(403, "web pages need a token; configure `users`");
            return (!page).then_some("-").ok_or_else(refused);
        }
        let mut given = headers.iter().filter_map(token_in);
        let token = given.next().unwrap_or_default();
        let agreed = given.all(|other| other == token);
        let mut found = None;
        for user in &self.users {
            let same = user.token.expose().as_bytes().ct_eq(token.as_bytes());
            found = bool::from(same).then_some(user.name.as_str()).or(found);
        }
        let right = "\"Authorization: Bearer TOKEN\" or \"x-api-key: TOKEN\"";
        let lack = || Reply::new(401, format!("wrong or no token; send yours as {right}"));
        found.filter(|_| agreed).ok_or_else(lack)
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
            let provider = upstream.provider;
            let prefix = if provider.keeps_v1 { "/" } else { "/v1/" };
            let rest = &target[name.len() + prefix.len()..];
            return Ok((upstream, format!("{}{rest}", upstream.base_url)));
        }
        let known = "no such path; /claude/v1/... and /chatgpt/v1/... are, where configured";
        Err(Reply::new(404, known))
    }

    /// Which providers can serve, and nothing secret: JSON.
    fn health(&self) -> String {
        let mut health = json!({ "status": "ok", "providers": {} });
        for upstream in &self.upstreams {
            let ready = upstream.credential.is_ready();
            let state = if ready { "ready" } else { "unavailable" };
            health["providers"][upstream.provider.name] = state.into();
        }
        health.to_string()
    }

    fn start_keepers(&self, interval: Duration) -> io::Result<Vec<JoinHandle<()>>> {
        let credentials = self.upstreams.iter().map(|u| u.credential.clone());
        let keepers = credentials.map(|c| spawn("keeper", move || c.keep(interval)));
        keepers.collect()
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

/// What a header offers as a token: nothing good, if it is not of the form that it must have.
fn token_in(header: &tiny_http::Header) -> Option<&str> {
    let value = header.value.as_str();
    let (scheme, token) = value.split_once(' ').unwrap_or_default();
    match () {
        _ if header.field.equiv("x-api-key") => Some(value),
        _ if !header.field.equiv("authorization") => None,
        _ if scheme.eq_ignore_ascii_case("bearer") => Some(token),
        _ => Some(""),
    }
}

// ─── credential ──────────────────────────────────────────────────────────────────────────────
// In: a provider's credential file, which its own tools may rewrite at any moment; the token
// endpoint's answers. Out: an access token that is good now, or why there is none. Requests and
// the keeper, one thread a provider, share the state; whoever has the turn refreshes and writes.
// What cannot happen: two refreshes at once, a token used before it is on disk, a file half
// written, a log-out undone.

struct Credential {
    provider: &'static Provider,
    path: PathBuf,
    token_url: String,
    agent: ureq::Agent,
    /// Held through a refresh until it is saved, so that there is one at a time.
    turn: Mutex<()>,
    /// Held by the one request that waits for its turn although the token is still good.
    first: Mutex<()>,
    state: Mutex<State>,
    /// Wakes the keeper when it is to stop.
    stopped: Condvar,
}

/// Touched in short locks, with the network in between.
#[derive(Default)]
struct State {
    token: Option<Token>,
    /// Of the file when it was last read; `None` when it must be read again anyhow.
    stamp: Option<Stamp>,
    refresh: Refresh,
    stopping: bool,
}

/// How refreshing the present login went so far.
#[derive(Default)]
struct Refresh {
    succeeded: Option<Instant>,
    /// The last wait after a failure.
    backoff: Duration,
    /// Why there is no new token, and when to try again: `None` is when the file changes.
    failure: Option<(String, Option<Instant>)>,
    /// What it brought that is not on disk yet, after the token that it was spent for.
    unsaved: Option<(Token, Token)>,
}

#[derive(Clone, PartialEq)]
struct Token {
    access: Secret,
    refresh: Option<Secret>,
    /// `None` serves until upstream answers 401.
    expires: Option<SystemTime>,
    account: Option<Secret>,
    /// For the vendor's own tool.
    id: Option<Secret>,
}

impl Token {
    /// Whether both are of one login, which no refresh has changed in between.
    fn is_of(&self, other: &Option<Token>) -> bool {
        other.as_ref().is_some_and(|t| t.refresh == self.refresh)
    }

    /// Whether it is still good `margin` from now, by the wall clock.
    fn lasts(&self, margin: Duration) -> bool {
        let end = SystemTime::now() + margin;
        self.expires.is_none_or(|expires| expires > end)
    }
}

/// Why a refresh brought nothing, and how long to wait at least: `None` is for ever.
type Failure = (String, Option<Duration>);

impl State {
    /// The token, if its refresh token may be spent now.
    fn refreshable(&self) -> Option<&Token> {
        let wait = self.is_young() || self.is_failing();
        let token = self.token.as_ref().filter(|_| !wait);
        token.filter(|token| token.refresh.is_some())
    }

    fn is_young(&self) -> bool {
        let age = self.refresh.succeeded.map(|at| at.elapsed());
        age.is_some_and(|age| age < TOKEN_MARGIN)
    }

    fn is_failing(&self) -> bool {
        let until = self.refresh.failure.as_ref().map(|(_, until)| *until);
        until.is_some_and(|until| until.is_none_or(|at| at > Instant::now()))
    }
}

/// A state of a file. Two that are equal hold the same bytes, but for the last `SETTLE_TIME`:
/// device, inode, size; ctime in seconds and nanoseconds; mtime.
#[derive(Clone, Copy, PartialEq)]
struct Stamp([u64; 3], [i64; 2], SystemTime);

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let meta = fs::metadata(path).ok()?;
        let file = [meta.dev(), meta.ino(), meta.size()];
        let changed = [meta.ctime(), meta.ctime_nsec()];
        Some(Stamp(file, changed, meta.modified().ok()?))
    }

    fn is_settled(&self) -> bool {
        self.2.elapsed().is_ok_and(|age| age > SETTLE_TIME)
    }
}

impl Credential {
    fn new(settings: &ProviderSettings, state_dir: &Path, network: &Network) -> Credential {
        let agent = network.agent(&settings.token_url).max_idle_connections(0);
        let agent = agent.timeout_global(Some(TOKEN_TIME)).build();
        Credential {
            provider: settings.provider,
            path: settings.provider.path(state_dir),
            token_url: settings.token_url.clone(),
            agent: agent.new_agent(),
            turn: Mutex::default(),
            first: Mutex::default(),
            state: Mutex::default(),
            stopped: Condvar::new(),
        }
    }

    /// An access token to use now. Waits for a refresh only when there is none that is good.
    fn token(&self) -> Result<Token, Reply> {
        let ageing = |token: &Token| !token.lasts(TOKEN_MARGIN);
        let old = self.look(false).refreshable().cloned();
        // Expired: all wait. Ageing: one does, while the others use what is still good.
        let first = self.first.try_lock();
        if let Some(old) = old.filter(ageing)
            && (first.is_ok() || !old.lasts(Duration::ZERO))
        {
            self.renew(lock(&self.turn), ageing);
        }
        drop(first);
        let state = self.look(false);
        let dead = |why: &str| Reply::new(503, format!("ai-mux has no login to use: {why}"));
        let usable = |t: &&Token| t.lasts(Duration::ZERO) || state.is_young();
        let token = state.token.as_ref().filter(usable);
        match (&state.refresh.failure, token) {
            (Some((why, None)), _) => Err(dead(why)),
            (_, Some(token)) => Ok(token.clone()),
            (Some((why, Some(until))), None) => {
                let wait = left_until(*until) + Duration::from_secs(1);
                let why = format!("the login could not be refreshed: {why}; wait and try again");
                Err(Reply::new(503, why).retry_after(wait))
            }
            (None, None) => Err(dead(&format!("it has expired; {}", self.remedy()))),
        }
    }

    /// Upstream answered 401 to this token: a newer one, from disk or from a refresh, if any.
    fn rejected(&self, token: &Token) -> Option<Token> {
        let same = |other: &Token| other.access == token.access;
        if self.look(true).token.as_ref().is_some_and(same) {
            self.renew(lock(&self.turn), same);
        }
        let newer = self.look(false).token.clone();
        newer.filter(|token| !same(token))
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
            self.adopt(&mut state);
        }
        state
    }

    fn adopt(&self, state: &mut State) {
        let (name, path) = (self.provider.name, self.path.display());
        let lack = |what: &str| format!("{path} {what}; {}", self.remedy());
        state.stamp = None;
        let (token, why) = match self.read() {
            Ok(None) if state.token.is_some() => return, // half-written: ours stays
            Ok(None) => (None, lack("is not whole JSON; if it stays so")),
            Ok(Some((stamp, json))) => {
                state.stamp = Some(stamp).filter(Stamp::is_settled);
                (self.provider.token_in(&json), lack("holds no login"))
            }
            Err(e) if state.token.is_none() => (None, e.to_string()),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                (None, e.to_string())
            }
            Err(e) => return warn!("{name}: {e}"), // ours stays: it may be the only copy
        };
        let failure = token.is_none().then_some((why, None));
        let known = token == state.token && (token.is_some() || failure == state.refresh.failure);
        let unsaved = state.refresh.unsaved.as_ref();
        if known || unsaved.is_some_and(|(old, _)| old.is_of(&token)) {
            return;
        }
        match &failure {
            None => info!("{name}: login read from {path}"),
            Some((why, _)) => warn!("{name}: {why}"),
        }
        state.token = token;
        state.refresh = Refresh::default();
        state.refresh.failure = failure;
    }

    /// What the file holds, if it is ours to use, else why not and what to do: `NotFound` and
    /// `InvalidInput` last, other errors may pass. `None` if it is not whole, or being written.
    fn read(&self) -> io::Result<Option<(Stamp, Value)>> {
        let (path, user) = (self.path.display(), rustix::process::geteuid().as_raw());
        let failed = |e: io::Error| match e.kind() {
            kind @ ErrorKind::NotFound => {
                io::Error::new(kind, format!("{path} is not there; {}", self.remedy()))
            }
            kind => io::Error::new(kind, format!("read {path}: {e}; let user {user} read it")),
        };
        let unfit = |why| Err(io::Error::new(ErrorKind::InvalidInput, why));
        let meta = fs::metadata(&self.path).map_err(failed)?;
        if meta.uid() != user {
            let mend = format!("make it ai-mux's: chown -R {user} {}", self.folder());
            return unfit(format!("{path} belongs to user {}; {mend}", meta.uid()));
        }
        if !meta.is_file() || meta.len() > FILE_SIZE {
            return unfit(format!("{path} is no credential file; {}", self.remedy()));
        }
        if meta.mode() & 0o077 != 0 {
            let tightened = fs::set_permissions(&self.path, fs::Permissions::from_mode(0o600));
            let outcome = tightened.map_or_else(|e| e.to_string(), |()| "done".into());
            warn!("{path}: others could read it; chmod 600: {outcome}");
        }
        let before = Stamp::of(&self.path);
        let bytes = fs::read(&self.path).map_err(failed)?;
        let unchanged = before.filter(|stamp| Stamp::of(&self.path) == Some(*stamp));
        Ok(unchanged.zip(serde_json::from_slice(&bytes).ok()))
    }

    fn folder(&self) -> std::path::Display<'_> {
        self.path.parent().unwrap_or(&self.path).display()
    }

    /// What the owner does about a login that is missing or dead.
    fn remedy(&self) -> String {
        let Provider { home, login, .. } = self.provider;
        format!("log in with: {home}={} {login}", self.folder())
    }

    fn keep(&self, interval: Duration) {
        let ageing = |token: &Token| !token.lasts(interval + TOKEN_MARGIN);
        let to_do = |s: &State| s.refresh.unsaved.is_some() || s.refreshable().is_some_and(ageing);
        while !lock(&self.state).stopping {
            let _ = catch_unwind(AssertUnwindSafe(|| {
                if to_do(&self.look(false)) {
                    self.renew(lock(&self.turn), ageing);
                }
            }));
            let state = lock(&self.state);
            let retry = state.refresh.failure.as_ref().and_then(|(_, until)| *until);
            let retry = retry.map(left_until).filter(|time| !time.is_zero());
            let time = retry.map_or(interval, |time| time.min(interval));
            if !state.stopping {
                drop(wait(&self.stopped, state, time));
            }
        }
        let _turn = lock(&self.turn); // once a refresh that is under way has ended
        self.save(None);
    }

    fn stop(&self) {
        lock(&self.state).stopping = true;
        self.stopped.notify_all();
    }

    /// One look at the login, and a refresh if the token on disk is still one that is due.
    fn renew(&self, _turn: MutexGuard<()>, due: impl Fn(&Token) -> bool) {
        self.save(None);
        let old = self.look(true).refreshable().cloned();
        let Some(old) = old.filter(due) else { return };
        if let Err((why, least)) = self.refresh(&old) {
            // Another tool may have refreshed meanwhile; then its login is the newer one.
            let mut state = self.look(true);
            if old.is_of(&state.token) {
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
        refresh.backoff = (refresh.backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
        let time = refresh.backoff.max(least).min(RETRY_AFTER_MAX);
        warn!("{name}: refresh: {why}; next try in {}s", time.as_secs());
        refresh.failure = Some((why, Some(Instant::now() + time)));
    }

    /// Spends a refresh token, but first finds out what could keep its yield from being saved.
    fn refresh(&self, old: &Token) -> Result<(), Failure> {
        if lock(&self.state).refresh.unsaved.is_some() {
            let why = "the last one is not on disk yet".into();
            return Err((why, Some(Duration::ZERO)));
        }
        let draft = Draft::new(&self.path).map_err(|why| {
            error!("{}: {why}; no token was spent", self.provider.name);
            (why, Some(Duration::ZERO))
        })?;
        let new = self.call(old)?;
        lock(&self.state).refresh.unsaved = Some((old.clone(), new));
        self.save(Some(draft));
        Ok(())
    }

    /// Asks the token endpoint. Of its answer, nothing but the `error` word is ever shown.
    fn call(&self, old: &Token) -> Result<Token, Failure> {
        let (provider, url) = (self.provider, &self.token_url);
        let passing = |e: &dyn Display| (format!("{url}: {e}"), Some(Duration::ZERO));
        let mut form = json!({ "grant_type": "refresh_token", "client_id": provider.client_id });
        form["refresh_token"] = old.refresh.as_ref().map(Secret::expose).into();
        if let Some(scope) = provider.scope {
            form["scope"] = scope.into();
        }
        let request = self.agent.post(url).content_type("application/json");
        let mut answer = request.send(form.to_string()).map_err(|e| passing(&e))?;
        let (status, wait) = (answer.status().as_u16(), retry_after(answer.headers()));
        let body = answer.body_mut().with_config().limit(TOKEN_SIZE);
        let text = body.read_to_vec().map_err(|e| passing(&e))?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        if status != 200 {
            let word = error_word(&json);
            let dead = provider.is_final(status, word);
            let wait = (!dead).then(|| wait.unwrap_or_default());
            return Err((format!("{url} answered {status} {word}"), wait));
        }
        let access = secret(&json["access_token"]);
        let access = access.ok_or_else(|| passing(&"the answer holds no token"))?;
        let lifetime = json["expires_in"].as_f64();
        let lifetime = lifetime.map(|seconds| seconds.clamp(LIFETIME_MIN, LIFETIME_MAX));
        let expires = lifetime.map(|s| SystemTime::now() + Duration::from_secs_f64(s));
        Ok(Token {
            expires: expires.or_else(|| time(&claims(&access)["exp"])),
            refresh: secret(&json["refresh_token"]).or(old.refresh.clone()),
            account: old.account.clone(),
            id: secret(&json["id_token"]).or(old.id.clone()),
            access,
        })
    }

    /// Puts what is unsaved on disk, then into use; or only into use, if that fails.
    fn save(&self, draft: Option<Draft>) {
        let unsaved = lock(&self.state).refresh.unsaved.clone();
        let Some((old, new)) = unsaved else { return };
        let (name, fresh) = (self.provider.name, draft.is_some());
        let draft = draft.map_or_else(|| Draft::new(&self.path), Ok);
        let saved = draft.and_then(|draft| self.write(&old, &new, draft));
        if fresh {
            info!("{name}: refreshed");
        }
        let mut state = self.look(saved.is_ok());
        let ours = |token: &Token| token.access == new.access;
        // Unless a login of the file's own, or a log-out, has won.
        if let (Err(why), Some(_)) = (saved, &state.refresh.unsaved) {
            error!("{name}: {why}; the new login is in memory only, and will be written again");
            state.token = Some(new.clone());
            (state.refresh.backoff, state.refresh.failure) = (Duration::ZERO, None);
        }
        if fresh && state.token.as_ref().is_some_and(ours) {
            state.refresh.succeeded = Some(Instant::now());
        }
    }

    /// Writes a new token into the file, unless that has a newer login: then the file wins.
    fn write(&self, old: &Token, new: &Token, draft: Draft) -> Result<(), String> {
        let failed = |e: &dyn Display| format!("write {}: {e}", self.path.display());
        let whole = self.read().map_err(|e| failed(&e))?;
        let (stamp, mut json) = whole.ok_or_else(|| failed(&"another program does"))?;
        if old.is_of(&self.provider.token_in(&json)) {
            self.provider.edit(&mut json, new);
            draft.publish(&json, stamp).map_err(|e| failed(&e))?;
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
        let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        if points.any(|point| point == escaped) {
            return Err(format!("{name} is a mount by itself; mount its folder"));
        }
        let path = target.with_extension("ai-mux-new");
        let _ = fs::remove_file(&path); // left behind by kill -9
        let size = fs::metadata(&target).map_err(failed)?.len() + TOKEN_SIZE;
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        let mut draft = Draft { target, path, file };
        let filled = io::copy(&mut io::repeat(b' ').take(size), &mut draft.file);
        filled.and_then(|_| draft.file.sync_all()).map_err(failed)?;
        Ok(draft)
    }

    /// Puts the text in place, unless the file is no longer the one that `stamp` was taken of.
    fn publish(self, json: &Value, stamp: Stamp) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(json)?;
        self.file.write_all_at(&text, 0)?;
        self.file.set_len(text.len() as u64)?;
        self.file.sync_all()?;
        if Stamp::of(&self.target) != Some(stamp) {
            return Err(io::Error::other("another program has changed it"));
        }
        fs::rename(&self.path, &self.target)?;
        File::open(self.target.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // gone already, once published
    }
}

fn secret(value: &Value) -> Option<Secret> {
    Secret::new(value.as_str()?)
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
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(payload.trim_end_matches('='));
    serde_json::from_slice(&bytes.unwrap_or_default()).unwrap_or_default()
}

/// A time as credential files have it: milliseconds above 10¹¹, else seconds.
fn time(value: &Value) -> Option<SystemTime> {
    let number = value.as_f64()?.clamp(0.0, 1e14);
    let unit = if number > 1e11 { 1000.0 } else { 1.0 };
    Some(UNIX_EPOCH + Duration::from_secs_f64(number / unit))
}

/// `Retry-After` in either form (RFC 9110 section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("retry-after")?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    date.duration_since(SystemTime::now()).ok()
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
        let inside = json[self.object].is_object();
        let object = if inside { &json[self.object] } else { json };
        let access = secret(&object[access])?;
        let claims = claims(&access);
        let claimed = &claims["https://api.openai.com/auth"]["chatgpt_account_id"];
        Some(Token {
            access,
            refresh: secret(&object[refresh]),
            expires: time(&object[expires]).or_else(|| time(&claims["exp"])),
            account: secret(&object["account_id"]).or_else(|| secret(claimed)),
            id: secret(&object["id_token"]),
        })
    }

    /// Writes a token into the parsed file, into the fields that are there; all else stays.
    fn edit(&self, json: &mut Value, token: &Token) {
        let now = SystemTime::now();
        if let Some(last) = json.get_mut("last_refresh") {
            *last = humantime::format_rfc3339_micros(now).to_string().into();
        }
        let inside = json[self.object].is_object();
        let object = if inside { &mut json[self.object] } else { json };
        let [access, refresh, expires] = self.keys;
        let mut set = |key: &str, new: Option<&Secret>| {
            if let (Some(old), Some(new)) = (object.get_mut(key), new) {
                *old = new.expose().into();
            }
        };
        set(access, Some(&token.access));
        set(refresh, token.refresh.as_ref());
        set("id_token", token.id.as_ref());
        if let Some(old) = object.get_mut(expires) {
            // Tools that share the file need a time: an hour, where nobody told one.
            let at = token.expires.unwrap_or(now + Duration::from_secs(3600));
            let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            let in_seconds = old.as_f64().is_some_and(|old| old <= 1e11);
            let unit = if in_seconds { 1000 } else { 1 };
            *old = (since.as_millis() as u64 / unit).into();
        }
    }
}

/// How upstreams are reached; for requests and refreshes alike.
struct Network {
    proxy: Option<ureq::Proxy>,
    roots: RootCerts,
}

type AgentConfig = ureq::config::ConfigBuilder<ureq::typestate::AgentScope>;

impl Network {
    fn new(config: &Config) -> Result<Network, Error> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let mut proxy = config.proxy.clone();
        let names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
        if let (None, Some(name)) = (&proxy, names.iter().find(|n| variable(n).is_some())) {
            let wrong = || Error::start(format!("{name} (not shown)"), "expected a proxy's URL");
            proxy = Some(ureq::Proxy::try_from_env().ok_or_else(wrong)?);
        }
        let mut roots = RootCerts::WebPki;
        if let Some(path) = variable("SSL_CERT_FILE") {
            let wrong = |e| Error::start("SSL_CERT_FILE", e);
            let found = certificates(path.as_ref()).map_err(wrong)?;
            let owned = |der| ureq::tls::Certificate::from_der(der).to_owned();
            roots = found.iter().map(|der| owned(der)).into();
        }
        Ok(Network { proxy, roots })
    }

    /// For a ureq agent with everything automatic off.
    fn agent(&self, url: &str) -> AgentConfig {
        let loopback = url.parse().is_ok_and(|uri| is_loopback(&uri));
        let tls = ureq::tls::TlsConfig::builder().root_certs(self.roots.clone());
        ureq::Agent::config_builder()
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
            .max_idle_age(UPSTREAM_IDLE)
    }
}

/// The certificates in a PEM file, one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let name = path.display();
    let pem = fs::read(path).map_err(|e| format!("read {name}: {e}"))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.ok().filter(|found| !found.is_empty());
    found.ok_or_else(|| format!("no certificate in {name}, expected PEM"))
}

/// The host of a URL, where it is an address and needs no resolver.
fn address_of(uri: &http::Uri) -> Option<IpAddr> {
    uri.host()?.trim_matches(['[', ']']).parse().ok()
}

fn is_loopback(uri: &http::Uri) -> bool {
    uri.host() == Some("localhost") || address_of(uri).is_some_and(|ip| ip.is_loopback())
}

/// Head read, body not.
type Answer = http::Response<ureq::Body>;

struct Upstream {
    provider: &'static Provider,
    base_url: String,
    headers: HeaderMap,
    agent: ureq::Agent,
    credential: Arc<Credential>,
}

impl Upstream {
    fn new(settings: ProviderSettings, config: &Config, network: &Network) -> Upstream {
        let time = Some(config.request_timeout);
        // An address needs no resolver, whose time limit costs a thread a request.
        let named = |uri| address_of(&uri).is_none();
        let named = settings.base_url.parse().is_ok_and(named);
        let agent = network
            .agent(&settings.base_url)
            .timeout_resolve(time.filter(|_| named))
            .timeout_connect(time)
            .timeout_send_request(time)
            .timeout_per_write(time)
            .timeout_recv_response(time)
            .timeout_per_read(Some(config.stream_idle_timeout))
            .max_idle_connections(config.workers)
            .max_idle_connections_per_host(config.workers);
        let connector = DefaultConnector::new().chain(Patience);
        Upstream {
            agent: ureq::Agent::with_parts(agent.build(), connector, DefaultResolver::default()),
            credential: Arc::new(Credential::new(&settings, &config.state_dir, network)),
            provider: settings.provider,
            base_url: settings.base_url,
            headers: settings.headers,
        }
    }

    /// The header policy: a request to upstream but for its token and body.
    fn outgoing(
        &self,
        request: &tiny_http::Request,
        url: String,
        head: &Head,
    ) -> Result<http::Request<()>, Reply> {
        let method = request.method().as_str();
        let mut outgoing = http::Request::builder().method(method).uri(url);
        for header in request.headers() {
            let name = header.field.as_str().as_str().to_ascii_lowercase();
            if !self.is_dropped(&name) && !head.nominated.contains(&name) {
                outgoing = outgoing.header(name, header.value.as_str());
            }
        }
        let usual = matches!(method, "POST" | "PUT" | "PATCH");
        outgoing = match head.framing {
            Framing::Sized(length) => outgoing.header(CONTENT_LENGTH, length),
            Framing::Chunked => outgoing.header(TRANSFER_ENCODING, "chunked"),
            // Without it ureq would send these chunked (RFC 9110 section 8.6 wants it anyway).
            Framing::Empty if usual => outgoing.header(CONTENT_LENGTH, 0),
            Framing::Empty => outgoing,
        };
        let outgoing = outgoing.body(());
        let mut outgoing = outgoing.map_err(|_| malformed("it cannot be passed on"))?;
        let headers = outgoing.headers_mut();
        for (name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        if let Some(ours) = self.provider.beta {
            let merged = merged_beta(headers, ours);
            headers.insert("anthropic-beta", header_value(&merged));
        }
        Ok(outgoing)
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
        outgoing: &http::Request<()>,
        token: &Token,
        held: &[u8],
        exchange: &mut Exchange,
    ) -> Result<Answer, Fault> {
        let mut request = outgoing.clone();
        let headers = request.headers_mut();
        let bearer = format!("Bearer {}", token.access.expose());
        headers.insert(AUTHORIZATION, header_value(&bearer));
        if let (None, Some(account)) = (self.provider.beta, &token.account) {
            headers.insert("chatgpt-account-id", header_value(account.expose()));
        }
        headers.values_mut().for_each(|v| v.set_sensitive(true));
        let sized = headers.contains_key(CONTENT_LENGTH);
        let bodied = sized || headers.contains_key(TRANSFER_ENCODING);
        let (agent, mut body) = (&self.agent, held.chain(&mut *exchange));
        let answer = match bodied {
            true => agent.run(request.map(|()| SendBody::from_reader(&mut body))),
            false => agent.run(request),
        };
        answer.map_err(|e| {
            let why = match e {
                ureq::Error::Timeout(_) => (504, "did not answer within request_timeout".into()),
                e => (502, format!("cannot be reached, or broke off: {e}")),
            };
            let reply = Reply::new(why.0, format!("{} {}", self.provider.name, why.1));
            exchange.fault.take().unwrap_or(reply.into())
        })
    }
}

/// `stream_idle_timeout` is ureq's limit for each read, but not for those of a head, which has
/// all of `request_timeout`.
#[derive(Debug)]
struct Patience;

#[derive(Debug)]
struct Patient<T>(T);

impl<T: Transport> Connector<T> for Patience {
    type Out = Patient<T>;

    fn connect(
        &self,
        _: &ConnectionDetails,
        to: Option<T>,
    ) -> Result<Option<Patient<T>>, ureq::Error> {
        Ok(to.map(Patient))
    }
}

impl<T: Transport> Transport for Patient<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, time: NextTimeout) -> Result<(), ureq::Error> {
        self.0.transmit_output(amount, time)
    }

    fn await_input(&mut self, mut time: NextTimeout) -> Result<bool, ureq::Error> {
        time.per_read = time
            .per_read
            .filter(|_| time.reason != ureq::Timeout::RecvResponse);
        self.0.await_input(time)
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}

/// Text that is known to fit a header.
fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("a Secret, or joined from headers")
}

/// Headers that neither a client nor a configuration may send upstream: authentication, account,
/// framing, `host`, hop-by-hop.
fn is_reserved(name: &str) -> bool {
    is_hop_by_hop(name)
        || matches!(name, "x-api-key" | "cookie" | "chatgpt-account-id")
        || matches!(name, "authorization" | "host" | "expect" | "content-length")
}

/// RFC 9110 section 7.6.1, and what proxies say to each other.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(name, "connection" | "keep-alive" | "te" | "trailer")
        || matches!(name, "transfer-encoding" | "upgrade")
        || name.starts_with("proxy-")
}

/// The values of `anthropic-beta` in their order, with ours once.
fn merged_beta(headers: &HeaderMap, ours: &str) -> String {
    let values = headers.get_all("anthropic-beta").iter();
    let values = values.filter_map(|value| value.to_str().ok());
    let mut items: Vec<_> = values.flat_map(|v| v.split(',')).map(str::trim).collect();
    items.push(ours);
    let mut once = [ours].into_iter();
    items.retain(|item| !item.is_empty() && (*item != ours || once.next().is_some()));
    items.join(",")
}

// ─── stream ──────────────────────────────────────────────────────────────────────────────────
// In: a client's bytes. Out: heads, decoded bodies; and to the client, answers, piece by piece.
// One rule bounds all of it: a socket knows an instant until which the present step must be done.

struct Socket {
    tcp: Arc<TcpStream>,
    /// When the present step ends in `TimedOut`.
    until: Instant,
    /// The time limit that the kernel was last told.
    told: Duration,
}

impl Socket {
    /// Does one read or write. The kernel is told of the time left only when that has changed
    /// much; it may be told less, as every wait is followed by another look at the clock.
    fn step<T>(&mut self, mut go: impl FnMut(&TcpStream) -> io::Result<T>) -> io::Result<T> {
        loop {
            let left = left_until(self.until);
            if left < Duration::from_millis(1) {
                return Err(ErrorKind::TimedOut.into());
            }
            if self.told < left / 2 || self.told > left + Duration::from_millis(100) {
                self.told = left;
                self.tcp.set_read_timeout(Some(left))?;
                self.tcp.set_write_timeout(Some(left))?;
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
        self.step(|mut tcp| tcp.read(out))
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.step(|mut tcp| tcp.write(bytes))
    }

    fn write_vectored(&mut self, parts: &[IoSlice]) -> io::Result<usize> {
        self.step(|mut tcp| tcp.write_vectored(parts))
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
            return self.receive(out);
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
        self.ahead = self.ahead.split_off(count); // an idle connection holds no buffer
    }
}

impl Stream {
    fn new(tcp: Arc<TcpStream>) -> Stream {
        let (until, told) = (Instant::now(), Duration::ZERO);
        Stream {
            socket: Socket { tcp, until, told },
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

    fn receive(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(out),
            None => self.socket.read(out),
        }
    }

    /// Takes in what has come, behind what was read ahead.
    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 4096];
        let count = self.receive(&mut chunk)?;
        self.ahead.extend_from_slice(&chunk[..count]);
        Ok(count)
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
                Ok(1..) if begun => {}
                Ok(1..) => self.socket.until = Instant::now() + HEAD_TIME,
                Err(e) if e.kind() == ErrorKind::TimedOut && begun => {
                    return Err(Reply::new(408, "the head came too slowly; send it at once"));
                }
                _ => return Ok(None),
            }
            begun = true;
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
        let _ = io::copy(&mut self.socket.take(LINGER_SIZE as u64), &mut io::sink());
    }
}

/// A client's request on its way to a worker, all but what tiny_http carries.
struct Exchange {
    stream: Stream,
    head: Head,
    body: Body,
    /// Why reading the body failed: ureq shows only an error of its own.
    fault: Option<Fault>,
}

impl Exchange {
    fn new(stream: Stream, head: Head) -> Exchange {
        Exchange {
            body: Body::new(head.framing),
            stream,
            head,
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
        match (outcome, self.fault.take()) {
            (Err(_), Some(fault)) => Err(fault),
            _ => Ok(held),
        }
    }

    fn read_body(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.head.expect) {
            self.stream.write_piece(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let began = Instant::now();
        self.stream.socket.until = began + self.body.patience();
        let count = self.body.read(&mut self.stream, out)?;
        self.body.waited += began.elapsed();
        self.body.received += count as u64;
        Ok(count)
    }
}

/// The body, decoded. Every error leaves a fault.
impl Read for Exchange {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let fault = match self.read_body(out) {
            Ok(_) if self.body.received > BODY_SIZE => body_too_large().into(),
            Ok(count) => return Ok(count),
            Err(e) => match e.kind() {
                ErrorKind::TimedOut => Reply::new(408, "the body came too slowly").into(),
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
#[derive(Default)]
struct Body {
    /// Of the present chunk.
    left: u64,
    chunked: bool,
    begun: bool,
    done: bool,
    /// How much of it came, and how long it was waited for.
    received: u64,
    waited: Duration,
}

impl Body {
    fn new(framing: Framing) -> Body {
        let chunked = framing == Framing::Chunked;
        let left = match framing {
            Framing::Sized(length) => length,
            _ => 0,
        };
        Body {
            left,
            chunked,
            done: left == 0 && !chunked,
            ..Body::default()
        }
    }

    /// How much longer it may be waited for: only time spent waiting for the client counts.
    fn patience(&self) -> Duration {
        let earned = Duration::from_millis(self.received * 1000 / BODY_RATE);
        (BODY_GRACE + earned).saturating_sub(self.waited)
    }

    fn read(&mut self, source: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
        if self.chunked && self.left == 0 && !self.done {
            self.next_chunk(source)?;
        }
        if self.done || out.is_empty() {
            return Ok(0);
        }
        let count = source.take(self.left).read(out)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        self.done = self.left == 0 && !self.chunked;
        Ok(count)
    }

    /// Reads a chunk's size and, after the last one, the trailers.
    fn next_chunk(&mut self, source: &mut impl BufRead) -> io::Result<()> {
        if std::mem::replace(&mut self.begun, true) && !chunk_line(source)?.is_empty() {
            return Err(invalid("a chunk is longer than its size"));
        }
        let line = chunk_line(source)?;
        let size = line.split(';').next().unwrap_or_default();
        // Rust's parser would take a sign.
        let digits = size.bytes().all(|b| b.is_ascii_hexdigit());
        let size = u64::from_str_radix(size, 16).ok().filter(|_| digits);
        self.left = size.ok_or_else(|| invalid("a chunk's size is not a number"))?;
        let mut lines = 0;
        while self.left == 0 && !chunk_line(source)?.is_empty() {
            lines += 1;
            if lines > FIELD_COUNT {
                return Err(invalid("there are too many trailers"));
            }
        }
        self.done = self.left == 0; // not before: what is broken is never read to its end
        Ok(())
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

fn chunk_line(source: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if source.take(LINE_SIZE as u64).read_line(&mut line)? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let plain = |text: &&str| text.bytes().all(|b| matches!(b, b'\t' | b' '..=b'~'));
    let text = line.strip_suffix("\r\n").filter(plain);
    let wrong = || invalid("a line between chunks is too long, not plain, or not ended by CRLF");
    text.map(str::to_owned).ok_or_else(wrong)
}

/// Passes the answer down as it comes: each piece is written at once.
fn relay(answer: Answer, exchange: &mut Exchange, access: &mut Access) -> Result<(), Fault> {
    let gone = |e: io::Error| Fault::Broken(format!("the client went away, or took nothing: {e}"));
    let (parts, body) = answer.into_parts();
    let fields = parts.headers.iter();
    let fields = fields.map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default()));
    debug!("peer={} answer: {}", access.peer, shown(fields));
    access.status = parts.status.as_u16();
    let request_id = parts.headers.get("request-id");
    access.request_id = request_id.or(parts.headers.get("x-request-id")).cloned();
    let bodyless = access.method == "HEAD" || matches!(access.status, 204 | 304);
    let (head, chunked) = answer_head(&parts, bodyless, &mut exchange.head);
    exchange.stream.write_piece(&head).map_err(gone)?;
    access.first = Some(access.started.elapsed());
    if bodyless {
        return Ok(());
    }
    // A chunk's size goes before the piece and CRLF behind it, so that it is one write.
    const SIZE: usize = "4000\r\n".len();
    let mut piece = vec![0; 2048]; // enough for most events; a large answer makes it grow
    let mut reader = body.into_reader();
    loop {
        let room = piece.len() - 2;
        let count = reader.read(&mut piece[SIZE..room]).map_err(broken_off)?;
        let end = SIZE + count;
        if chunked {
            let _ = write!(&mut piece[..SIZE], "{count:04x}\r\n"); // always fits
            piece[end..end + 2].copy_from_slice(b"\r\n");
        }
        let framed = if chunked { 0..end + 2 } else { SIZE..end };
        exchange.stream.write_piece(&piece[framed]).map_err(gone)?;
        access.bytes += count as u64;
        if end == room {
            piece.resize(SIZE + PIECE_SIZE + 2, 0);
        }
        if count == 0 {
            return Ok(()); // and the chunk of no bytes was the last
        }
    }
}

fn broken_off(e: io::Error) -> Fault {
    Fault::Broken(match ureq::Error::from(e) {
        ureq::Error::Timeout(_) => "upstream was silent for stream_idle_timeout".into(),
        e => format!("upstream broke off: {e}"),
    })
}

/// The answer's head, framed anew; and whether its body goes in chunks. HTTP/1.0 has none: there
/// the end of the connection is the end of a body without a size.
fn answer_head(parts: &http::response::Parts, bodyless: bool, asked: &mut Head) -> (Vec<u8>, bool) {
    let headers = &parts.headers;
    let sized = headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(TRANSFER_ENCODING);
    let chunked = !sized && !bodyless && !asked.http10;
    asked.close |= !sized && !bodyless && asked.http10;
    let reason = parts.status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", parts.status.as_str()).into_bytes();
    let items = |value: &HeaderValue| value.to_str().unwrap_or_default().to_lowercase();
    let connection: Vec<_> = headers.get_all("connection").iter().map(items).collect();
    let connection = connection.join(",");
    for (name, value) in headers {
        let name = name.as_str();
        let dropped = is_hop_by_hop(name)
            || matches!(name, "set-cookie" | "alt-svc")
            || name == CONTENT_LENGTH && !sized
            || connection.split(',').any(|item| item.trim() == name);
        if !dropped {
            head.extend([name.as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
    }
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

/// What a field stands for, or what is wrong with it.
type Checked<T> = Result<T, String>;

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

impl Config {
    fn load(path: Option<&Path>) -> Result<Config, Error> {
        let Some(path) = path else {
            return Config::read(Yaml::Null).map_err(Error::config);
        };
        let wrong = |e: &dyn Display| Error::config(format!("{}: {e}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| wrong(&format!("read: {e}")))?;
        let file = match path.extension().is_some_and(|e| e == "json") {
            true => serde_json::from_str(&text).map_err(|e| wrong(&e))?,
            false => serde_yaml::from_str(&text).map_err(|e| wrong(&e))?,
        };
        Config::read(file).map_err(|e| wrong(&e))
    }

    fn read(file: Yaml) -> Checked<Config> {
        let mut fields = Fields::new(String::new(), file)?;
        let listen = fields.take("listen", ADDRESS, address)?;
        let state_dir = fields.take("state_dir", PATH, expand)?;
        let state_dir = state_dir.or_else(|| expand("~/.ai-mux".into()));
        let log_level = fields.take("log_level", LEVELS, log_level)?;
        let possible = |number: usize| (1..=4096).contains(&number).then_some(number);
        let workers = fields.take("workers", "1 to 4096", possible)?;
        let tls = fields.take("tls", "a mapping", Some)?;
        let (tick, second) = (Duration::from_millis(1), Duration::from_secs(1));
        let config = Config {
            listen: listen.unwrap_or(":8080".into()),
            state_dir: state_dir.ok_or("state_dir: no HOME for its default, expected a path")?,
            log_level: log_level.unwrap_or(LevelFilter::Info),
            providers: fields.list("providers", ProviderSettings::read)?,
            users: fields.list("users", User::read)?,
            request_timeout: fields.time("request_timeout", 60, tick)?,
            stream_idle_timeout: fields.time("stream_idle_timeout", 300, tick)?,
            refresh_check_interval: fields.time("refresh_check_interval", 600, second)?,
            workers: workers.unwrap_or(64),
            proxy: fields.take("proxy", PROXY, proxy)?,
            tls: TlsFiles::read(tls.unwrap_or_default())?,
        };
        fields.end()?;
        config.check()?;
        Ok(config)
    }

    /// What one field alone cannot tell.
    fn check(&self) -> Checked<()> {
        let same = |a: &User, b: &User| a.name == b.name || a.token == b.token;
        if let Some(user) = repeated(&self.users, same) {
            let name = &user.name;
            return Err(format!("users: found {name:?} or its token again"));
        }
        let same = |a: &ProviderSettings, b: &ProviderSettings| a.provider.name == b.provider.name;
        if let Some(again) = repeated(&self.providers, same) {
            let name = again.provider.name;
            return Err(format!("providers: found {name} again, expected each once"));
        }
        let tls = self.tls.as_ref().map(TlsFiles::load).transpose();
        tls.map(drop).map_err(|e| format!("tls.{e}"))
    }

    /// Those configured, or, where none is, those that have a credential file.
    fn providers(&self) -> Result<Vec<ProviderSettings>, Error> {
        if !self.providers.is_empty() {
            return Ok(self.providers.clone());
        }
        let path = |provider: &Provider| provider.path(&self.state_dir);
        let found = PROVIDERS.iter().filter(|p| path(p).exists());
        let found: Vec<_> = found.map(ProviderSettings::from).collect();
        if found.is_empty() {
            let [claude, chatgpt] = PROVIDERS.each_ref().map(path);
            let why = format!("neither {claude:?} nor {chatgpt:?} is there; log in first");
            return Err(Error::start("find a login", why));
        }
        Ok(found)
    }
}

/// The first item that one before it equals.
fn repeated<T>(items: &[T], same: impl Fn(&T, &T) -> bool) -> Option<&T> {
    let again = |at: &usize| items[..*at].iter().any(|other| same(other, &items[*at]));
    (1..items.len()).find(again).map(|at| &items[at])
}

/// A provider, as configured.
#[derive(Clone)]
struct ProviderSettings {
    provider: &'static Provider,
    headers: HeaderMap,
    base_url: String,
    token_url: String,
}

impl From<&'static Provider> for ProviderSettings {
    fn from(provider: &'static Provider) -> ProviderSettings {
        ProviderSettings {
            provider,
            headers: HeaderMap::new(),
            base_url: provider.base_url.into(),
            token_url: provider.token_url.into(),
        }
    }
}

impl ProviderSettings {
    fn read(mut fields: Fields) -> Checked<ProviderSettings> {
        let at = fields.path.clone();
        let known = |name: String| PROVIDERS.iter().find(|p| p.name == name);
        let provider = fields.take("name", "claude or chatgpt", known)?;
        let provider = provider.ok_or_else(|| format!("{at}name: missing"))?;
        let mut settings = ProviderSettings::from(provider);
        let strings = Some::<HashMap<String, String>>;
        let headers = fields.take("headers", "names and strings", strings)?;
        for (name, value) in headers.unwrap_or_default() {
            let key = HeaderName::try_from(&name).ok();
            let key = key.filter(|key| !is_reserved(key.as_str()));
            let (Some(key), Ok(value)) = (key, HeaderValue::from_str(&value)) else {
                let right = "a header that may be set, and its value in ASCII";
                return Err(format!("{at}headers.{name}: (not shown) expected {right}"));
            };
            settings.headers.insert(key, value);
        }
        let base_url = fields.take("base_url", URL, url)?;
        let token_url = fields.take("token_url", URL, url)?;
        settings.base_url = base_url.unwrap_or(settings.base_url);
        settings.token_url = token_url.unwrap_or(settings.token_url);
        fields.end().map(|()| settings)
    }
}

#[derive(Clone)]
struct User {
    name: String,
    token: Secret,
}

impl User {
    fn read(mut fields: Fields) -> Checked<User> {
        let plain = |name: &String| !name.is_empty() && !name.contains(char::is_control);
        let name = fields.take("name", "a name", |name| Some(name).filter(plain))?;
        let token = fields.take("token", TOKEN, |text: String| user_token(&text))?;
        let file = |path| user_token(fs::read_to_string(expand(path)?).ok()?.trim());
        let from_file = fields.take("token_file", TOKEN_FILE, file)?;
        fields.end()?;
        let at = fields.path;
        let wrong = || format!("expected `{at}name`, and one of `token` and `token_file`");
        let (name, token) = name.zip(token.xor(from_file)).ok_or_else(wrong)?;
        Ok(User { name, token })
    }
}

#[derive(Clone)]
struct TlsFiles {
    cert: PathBuf,
    key: PathBuf,
}

impl TlsFiles {
    fn read(value: Yaml) -> Checked<Option<TlsFiles>> {
        let mut fields = Fields::new("tls.".into(), value)?;
        let enabled = fields.take("enabled", "true or false", Some::<bool>)?;
        let cert = fields.take("cert_path", PATH, expand)?;
        let key = fields.take("key_path", PATH, expand)?;
        fields.end()?;
        match (enabled.unwrap_or(false), cert, key) {
            (false, ..) => Ok(None),
            (true, Some(cert), Some(key)) => Ok(Some(TlsFiles { cert, key })),
            _ => Err("tls: expected `cert_path` and `key_path`".into()),
        }
    }

    fn stamps(&self) -> [Option<Stamp>; 2] {
        [Stamp::of(&self.cert), Stamp::of(&self.key)]
    }

    fn load(&self) -> Checked<Arc<CertifiedKey>> {
        let (cert, key) = (self.cert.display(), self.key.display());
        let chain = certificates(&self.cert).map_err(|e| format!("cert_path: {e}"))?;
        let pem = fs::read(&self.key).map_err(|e| format!("key_path: read {key}: {e}"))?;
        // The parser's own error could quote the key.
        let der = PrivateKeyDer::from_pem_slice(&pem);
        let der = der.map_err(|_| format!("key_path: no private key in {key}, expected PEM"))?;
        let pair = CertifiedKey::from_der(chain, der, &rustls::crypto::ring::default_provider());
        let wrong = |e| format!("key_path: {key} is not the key of {cert}: {e}");
        pair.map(Arc::new).map_err(wrong)
    }
}

/// A mapping whose fields are taken one by one; what is left in the end is unknown. No value is
/// as good as no field.
struct Fields {
    /// What its fields' names are appended to: `users[0].`, or nothing.
    path: String,
    left: serde_yaml::Mapping,
    known: Vec<&'static str>,
}

impl Fields {
    fn new(path: String, value: Yaml) -> Checked<Fields> {
        let left = match value {
            Yaml::Null => serde_yaml::Mapping::new(),
            Yaml::Mapping(fields) => fields,
            _ => return Err(format!("expected `{path}NAME: VALUE`")),
        };
        let known = Vec::new();
        Ok(Fields { path, left, known })
    }

    /// A field, if it is there, as the type `R`, made into what it stands for; `right` says
    /// what it can be.
    fn take<R: DeserializeOwned, T>(
        &mut self,
        name: &'static str,
        right: &str,
        made: impl FnOnce(R) -> Option<T>,
    ) -> Checked<Option<T>> {
        self.known.push(name);
        let found = self.left.remove(name).unwrap_or_default();
        if found.is_null() {
            return Ok(None);
        }
        let mut text = serde_yaml::to_string(&found).unwrap_or_default();
        // What has several lines is out of place; a URL with a user in it has a password in it.
        let secret = ["users", "token", "headers", "proxy"].contains(&name);
        if secret || text.trim().contains(['@', '\n']) {
            text = "(not shown)".into();
        }
        let value = serde_yaml::from_value(found).ok().and_then(made);
        let (path, text) = (&self.path, text.trim());
        let wrong = || format!("{path}{name}: found {text}, expected {right}");
        value.map(Some).ok_or_else(wrong)
    }

    /// A list of mappings; an entry may be just its name.
    fn list<T>(&mut self, name: &'static str, read: fn(Fields) -> Checked<T>) -> Checked<Vec<T>> {
        let entries = self.take(name, "a list", Some::<Vec<Yaml>>)?;
        let entries = entries.unwrap_or_default().into_iter().enumerate();
        let read = |(at, mut entry): (usize, Yaml)| {
            if entry.is_string() {
                entry = serde_yaml::Mapping::from_iter([("name".into(), entry)]).into();
            }
            read(Fields::new(format!("{name}[{at}]."), entry)?)
        };
        entries.map(read).collect()
    }

    /// A duration, no longer than a year, so that no sum with a clock overflows.
    fn time(&mut self, name: &'static str, usual: u64, least: Duration) -> Checked<Duration> {
        let right = format!("60s, 1h30m or the like, or seconds; at least {least:?}");
        let time = self.take(name, &right, |value: Yaml| {
            let seconds = value.as_u64().map(Duration::from_secs);
            let time = seconds.or_else(|| humantime::parse_duration(value.as_str()?).ok())?;
            let year = Duration::from_secs(365 * 86400);
            (least..=year).contains(&time).then_some(time)
        });
        Ok(time?.unwrap_or(Duration::from_secs(usual)))
    }

    fn end(&self) -> Checked<()> {
        let Some(name) = self.left.keys().next() else {
            return Ok(());
        };
        let (path, known) = (&self.path, self.known.join(", "));
        let name = name.as_str().unwrap_or("(not text)");
        Err(format!("{path}{name}: unknown, expected one of {known}"))
    }
}

const PATH: &str = "a path, or ~/PATH where HOME is set";

fn expand(path: String) -> Option<PathBuf> {
    match path.strip_prefix('~') {
        None => Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty()),
        Some(rest) if !rest.is_empty() && !rest.starts_with('/') => None,
        Some(rest) => Some(PathBuf::from(std::env::var_os("HOME")?).join(rest.trim_matches('/'))),
    }
}

const ADDRESS: &str = "\":PORT\" or \"HOST:PORT\"";

fn address(text: String) -> Option<String> {
    let (host, port) = text.rsplit_once(':')?;
    let plain = !host.contains(':') || host.starts_with('[') && host.ends_with(']');
    (plain && port.parse::<u16>().is_ok()).then_some(text)
}

const LEVELS: &str = "debug, info, warn or error";

fn log_level(text: String) -> Option<LevelFilter> {
    let offered = LEVELS.split([',', ' ']).any(|word| word == text);
    text.parse().ok().filter(|_| offered)
}

const PROXY: &str = "http://HOST:PORT, socks5://HOST:PORT or the like";

fn proxy(text: String) -> Option<ureq::Proxy> {
    let uri: http::Uri = text.parse().ok()?;
    let (authority, host) = (uri.authority()?.as_str(), uri.host()?);
    let ported = uri.port_u16().is_some() || authority.ends_with(host);
    let whole = uri.scheme().is_some() && !host.is_empty() && ported;
    ureq::Proxy::new(&text).ok().filter(|_| whole)
}

const URL: &str = "https://HOST/PATH, or http:// to a loopback address; no user, no query";

fn url(text: String) -> Option<String> {
    let uri: http::Uri = text.parse().ok()?;
    let safe = match uri.scheme_str()? {
        "http" => is_loopback(&uri),
        scheme => scheme == "https",
    };
    let plain = !uri.host()?.is_empty() && !text.contains(['@', '?', '#']);
    (safe && plain).then(|| text.trim_end_matches('/').to_owned())
}

const TOKEN: &str = "16 or more visible ASCII characters, in quotes if need be";
const TOKEN_FILE: &str = "a file to read, with 16 or more visible ASCII characters";

fn user_token(text: &str) -> Option<Secret> {
    let right = text.len() >= 16 && !text.contains(' ');
    Secret::new(text).filter(|_| right)
}

// ─── replies and errors ──────────────────────────────────────────────────────────────────────
// A `Reply` is what a client hears from ai-mux itself, an `Error` what the operator reads when
// it cannot start. Both say what to do.

/// The exit code, and why.
struct Error(u8, String);

impl Error {
    fn start(what: impl Display, why: impl Display) -> Error {
        Error(1, format!("{what}: {why}"))
    }

    fn config(message: impl Display) -> Error {
        Error(2, message.to_string())
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

    fn retry_after(mut self, wait: Duration) -> Reply {
        self.retry_after = Some(wait);
        self
    }

    fn internal() -> Reply {
        Reply::new(500, "a fault of ai-mux; its log says more")
    }

    /// The whole answer: head, and the body that both vendors' SDKs show; and that one's length.
    fn to_bytes(&self, head_only: bool, last: bool) -> (Vec<u8>, u64) {
        let status = self.status;
        let reason = http::StatusCode::from_u16(status).unwrap_or_default();
        let kind = match status {
            400 | 426 => "invalid_request_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            413 | 431 => "request_too_large",
            _ => "api_error",
        };
        let code = reason.canonical_reason().unwrap_or_default();
        let code = code.to_ascii_lowercase().replace(' ', "_");
        let error = json!({ "type": kind, "message": self.message, "param": null, "code": code });
        let body = match status {
            200 => self.message.clone(),
            _ => json!({ "type": "error", "error": error }).to_string(),
        };
        let date = httpdate::fmt_http_date(SystemTime::now());
        let mut text = format!("HTTP/1.1 {reason}\r\ndate: {date}\r\n");
        text += &format!("content-length: {}\r\n", body.len());
        if let Some(wait) = self.retry_after {
            text += &format!("retry-after: {}\r\n", wait.as_secs());
        }
        // Trying again cannot help; without this, SDKs do so for minutes and show nothing.
        let lasting = matches!(status, 400..=407 | 409..500 | 503) && self.retry_after.is_none();
        for (said, field) in [
            (true, "content-type: application/json\r\n"),
            (status == 401, "www-authenticate: Bearer\r\n"),
            (
                status == 426,
                "upgrade: HTTP/1.1\r\nconnection: upgrade\r\n",
            ),
            (lasting, "x-should-retry: false\r\n"),
            (last, "connection: close\r\n"),
            (true, "\r\n"),
            (!head_only, &body),
        ] {
            text += if said { field } else { "" };
        }
        let length = if head_only { 0 } else { body.len() as u64 };
        (text.into_bytes(), length)
    }
}

fn malformed(why: &str) -> Reply {
    Reply::new(400, format!("malformed request: {why}"))
}

fn head_too_large() -> Reply {
    Reply::new(431, "the head is too large; send fewer or shorter headers")
}

fn body_too_large() -> Reply {
    let most = BODY_SIZE >> 20;
    Reply::new(413, format!("the body is over {most} MiB; send less"))
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
}

impl Access {
    fn new(peer: SocketAddr, method: &str, path: &str) -> Access {
        Access {
            peer,
            started: Instant::now(),
            user: "-".into(),
            provider: "-",
            method: method.into(),
            path: path.into(),
            status: 0,
            bytes: 0,
            first: None,
            request_id: None,
        }
    }

    fn log(&self, ended: Option<String>) {
        let (peer, provider, method) = (self.peer, self.provider, &self.method);
        let (status, bytes) = (self.status, self.bytes);
        let path = self.path.get(..200).unwrap_or(&self.path); // ASCII, as the gate has seen to
        let mut user = self.user.clone();
        if user.contains([' ', '"']) {
            user = format!("{user:?}");
        }
        let first = self.first.map(|first| format!("{}ms", first.as_millis()));
        let first = first.as_deref().unwrap_or("-");
        let total = self.started.elapsed().as_millis();
        let mut line = format!(
            "peer={peer} user={user} provider={provider} method={method} path={path} \
             status={status} bytes={bytes} first={first} total={total}ms"
        );
        if let Some(id) = self.request_id.as_ref().filter(|_| status >= 400) {
            let plain = |id: &&str| id.len() <= 128 && !id.contains(['"', ' ']);
            let id = id.to_str().ok().filter(plain);
            line += &format!(" request-id={}", id.unwrap_or("?"));
        }
        let ended = ended.map(|why| format!(" ended={why:?}"));
        info!("{line}{}", ended.unwrap_or_default());
    }
}

/// Header fields for the log: the names of all, the values of those that are known to hold
/// neither a secret nor anything personal.
fn shown<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    const HARMLESS: &str = "accept accept-encoding anthropic-beta anthropic-version connection \
        content-encoding content-length content-type date request-id retry-after \
        transfer-encoding user-agent x-request-id x-should-retry";
    let shown = fields.map(|(name, value)| {
        match HARMLESS.split(' ').any(|h| h.eq_ignore_ascii_case(name)) {
            true => format!("{name}: {value:?}"),
            false => format!("{name}: ({} bytes)", value.len()),
        }
    });
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
        let journal = std::env::var_os("JOURNAL_STREAM").is_some();
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        let time = if journal { "" } else { &format!("{now} ") };
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let text = format_args!("{time}{}", record.args());
            let mut timed = log::Record::builder();
            timed.metadata(record.metadata().clone()).args(text);
            self.0.log(&timed.build());
        }));
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
        let place = panic.location().map(ToString::to_string);
        let place = place.unwrap_or_default();
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
}

// What tests/reads_requests_one_way.rs, which compiles this file as a module, sees of its inside.
#[cfg(test)]
#[path = "../tests/fuzz/inside.rs"]
pub(crate) mod inside;
