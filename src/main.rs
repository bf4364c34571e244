//! ai-mux lets the owner of a Claude or ChatGPT subscription reach it from their own devices
//! with a plain bearer token: it checks that token, swaps in the subscription's OAuth token,
//! keeps that one fresh and safely on disk, and streams the answer back as it comes.
//!
//! ```text
//!    ┌══════════ body up, answer down, piece by piece ══════════┐
//!    v                                                          v
//! client ══ TCP/TLS: head ══> gate ── ticket ──> tiny_http ──> worker <══ ureq ══> upstream
//!                             │  ^                             ^ │ ^
//!                             │  └─── verdict: the stream ─────┼─┘ └── token <── credential file
//!                             └────── exchange, parked ────────┘                   ^
//!                                              token endpoint <══ refresh ─────────┘
//! ```
//!
//! - The **gate** is one thread that holds every client no worker has, and waits for none alone. It
//!   reads heads, and refuses what is malformed, has no token, or leads nowhere.
//! - An **exchange** is one request, from its head to its verdict. It queues in the gate for one of
//!   the **workers**, a pool of bounded size, and is then *parked*: the next worker takes it.
//! - **tiny_http** wakes that worker: it hands out a ticket that the gate sends it on the **inner
//!   connection**. It is kept from the network: there it has no deadlines, hangs under a burst, and
//!   aborts on an absurd length.
//! - The worker may block, within its deadlines. It alone reads the body and writes upstream's
//!   answer. Its **verdict** gives the client's stream back to the gate, or says that it is closed.
//! - A **credential** looks after a provider's **login**, the tokens in its file. Whoever finds it
//!   ageing, a worker or its **keeper** in the background, refreshes it, one at a time.
//! - A **reply** is ai-mux's own answer; all else that a client hears, but for 100 Continue, is
//!   upstream's.
//!
//! The sections, from the story to the reference; most callers stand above what they call:
//!
//! ```text
//! limits      the bounds of all that comes in, is kept, or is waited for
//! main        command line, exit codes, state_dir's lock; helpers for locks, time, threads
//! exchange    one request, from its head to its verdict; what all threads share
//! gate        the event loop: connections, queue, number of workers
//!   the start   descriptors, signals, listener, TLS files
//!   the head    from bytes to a checked `Head`
//! server      tickets, panic fence
//! handler     policy: `screen` (in the gate), `handle` (in a worker), users, routes, health
//! credential  read, adopt, refresh, save a login
//! upstream    what the vendors differ in, their files, header policy
//!   the connection  ureq, roots, proxy, look-ups, deadlines
//! stream      socket, deadline, TLS; body up, answer down
//! config      from YAML or JSON to a checked `Config`
//! replies     ai-mux's own answers
//! log         access log, what may be shown, the logger
//! secret      a token that does not print
//! ```

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, BufRead, Cursor, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, debug, error, info, log, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use serde_yaml::{Mapping, Value as Yaml};
use subtle::ConstantTimeEq;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, TRANSFER_ENCODING};
use ureq::http::{self, HeaderMap, HeaderName, HeaderValue, response::Parts};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport,
};
use ureq::{SendBody, tls::RootCerts};

use secret::Secret;

/// With musl's own allocator, a request costs half as much again; glibc's keeps an arena for each
/// thread.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

// ─── limits ──────────────────────────────────────────────────────────────────────────────────
// The bounds of the program, each with its reason unless it is a plain choice; most of those of a
// setting stand in config. Sizes are bytes.

/// The largest head of a request, its request line and all fields.
const HEAD_SIZE: usize = 32 << 10;
/// The most fields in a head, or in trailers; no real client sends as many.
const FIELD_COUNT: usize = 100;
/// One line of a head, or between chunks. Must fit ureq's output buffer, which takes a header line
/// whole.
const LINE_SIZE: usize = 8 << 10;
/// For a TLS handshake, and for a head from its first byte.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Before a head's first byte. Clients pool connections for a minute or two.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// How long the gate pauses, and with it all clients that have no worker, when there is no room,
/// or no descriptor, for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What is read from a client in one go: a head and a small body fit.
const READ_SIZE: usize = 8 << 10;
/// The least length of a user's token. A method must be shorter: the log shows methods, and one
/// could be a token.
const USER_TOKEN_LENGTH: usize = 16;
/// The most of a path or a request id, and the longest header name or value, that the log shows.
const TEXT_SHOWN: usize = 200;
/// A request body; both vendors refuse larger ones themselves.
const BODY_SIZE: u64 = 64 << 20;
/// The largest body that is held in memory, whole, so that it can be sent a second time.
const HELD_SIZE: u64 = 1 << 20;
/// A body may be waited for this long, and a second more for each `BODY_RATE` that came of it.
const BODY_GRACE: Duration = Duration::from_secs(10);
const BODY_RATE: u32 = 1 << 10;
/// What is read from upstream and written to the client in one go; and how long such a write, or
/// one silence in a request's body, may take.
const PIECE_SIZE: usize = 16 << 10;
const PIECE_TIME: Duration = Duration::from_secs(30);
/// A blocked write is tried again this often, whatever poll says: Linux reports room only once a
/// third of the socket's buffer is free, which a slow reader may need more than `PIECE_TIME` for.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// After a last answer, what the client still sends is drained this long: see `half_close`.
const LINGER_TIME: Duration = Duration::from_secs(2);
/// For tiny_http to hand out the first ticket, at start.
const PICKUP_TIME: Duration = Duration::from_secs(5);
/// Workers started beyond those needed: one that already waits in `recv` takes a ticket sooner than
/// one that is just finishing, by a fifth of a request's time.
const SPARE_WORKERS: usize = 3;
/// How often idle workers are ended, and the certificate files looked at.
const CHORE_INTERVAL: Duration = Duration::from_secs(5);
/// Client connections beyond those that workers serve.
const SPARE_CONNECTIONS: u64 = 1024;
/// New connections that the kernel may queue for us, unless its net.core.somaxconn is less; beyond
/// that, clients wait for seconds, or are reset.
const BACKLOG: i32 = 4096;
/// Descriptors for listener, log, files, the inner connection and token calls; and per worker,
/// for an upstream in use, one kept, and a file or a name to look up.
const SPARE_DESCRIPTORS: u64 = 32;
const WORKER_DESCRIPTORS: u64 = 3;
/// Virtual size of our threads' stacks; debug builds of the TLS code need the most.
const STACK_SIZE: usize = 512 << 10;
/// ureq's buffers, per upstream connection: an answer's head must fit the first, a header line
/// of ours the second. Larger ones gain nothing, as each piece is passed on at once.
const UPSTREAM_INPUT: usize = 16 << 10;
const UPSTREAM_OUTPUT: usize = LINE_SIZE + 1024;
/// Idle connections to each upstream, which keep those buffers; more are closed after a burst.
const UPSTREAMS_KEPT: usize = 32;
/// How long an idle upstream connection may be used again; most servers close theirs after 20 s
/// or more.
const UPSTREAM_IDLE: Duration = Duration::from_secs(15);
/// How long an upstream's addresses are used before they are looked up again.
const LOOKUP_AGE: Duration = Duration::from_secs(30);
/// For a new look-up, while the old addresses may serve.
const LOOKUP_TIME: Duration = Duration::from_secs(2);
/// A credential file; real ones have less than 10 KiB.
const FILE_SIZE: u64 = 1 << 20;
/// A file changed this recently may change again and keep the same time stamps.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// The pause before a failed save is tried again: by then, what another program was doing to the
/// file is over.
const SAVE_PAUSE: Duration = Duration::from_millis(250);
/// A call to a token endpoint, and its answer.
const REFRESH_TIME: Duration = Duration::from_secs(30);
const REFRESH_SIZE: u64 = 64 << 10;
/// An access token with less than this left is refreshed, but not within this time of the last
/// refresh.
const REFRESH_MARGIN: Duration = Duration::from_secs(60);
/// Spent refresh tokens remembered, to recognise a file that is put back: about a year's.
const SPENT_COUNT: usize = 1000;
/// What is believed of `expires_in`, in seconds.
const LIFETIME_MIN: f64 = 60.0;
const LIFETIME_MAX: f64 = 30.0 * 86400.0;
/// The wait after a failed refresh: from the first, doubling up to the second.
const BACKOFF_MIN: Duration = Duration::from_secs(5);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// The longest `Retry-After` that is honoured, lest a mistake shut a provider for weeks.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(86400);
/// After a signal, for running requests.
const STOP_TIME: Duration = Duration::from_secs(10);
/// For those that are cut short then, to say so in the log.
const CUT_TIME: Duration = Duration::from_secs(1);
/// The longest duration in a configuration: longer than anything takes, and short enough to be
/// added to any clock.
const DURATION_MAX: Duration = Duration::from_secs(365 * 86400);

// ─── main ────────────────────────────────────────────────────────────────────────────────────
// In: the command line. Out: an exit code: 1 for a failure to start or run, 2 for a bad command
// line or configuration, else 0.

const HELP: &str = "\
ai-mux: your own Claude or ChatGPT subscription, from all your own devices

usage: ai-mux [--config PATH]

  --config PATH   configuration, YAML, or JSON when PATH ends in .json; without it, all defaults
  --help          this text
  --version       the version
";

fn main() -> ExitCode {
    let Err((code, message)) = run() else {
        return ExitCode::SUCCESS;
    };
    // Not eprintln!, which panics when nobody reads standard error.
    let _ = writeln!(io::stderr(), "ai-mux: {message}");
    ExitCode::from(code)
}

/// Does what the command line says. An error is the exit code, and words that say what to do.
fn run() -> Result<(), (u8, String)> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(|a| a.to_str()).collect();
    let config = match words[..] {
        [] => parse_config(Yaml::Null),
        [Some("--config"), _] => load_config(Path::new(&arguments[1])),
        [Some("--help")] => return print(HELP),
        [Some("--version")] => return print(concat!("ai-mux ", env!("CARGO_PKG_VERSION"), "\n")),
        _ => Err("expected --config PATH; see --help".into()),
    };
    serve(config.map_err(|e| (2, e))?).map_err(|e| (1, e))
}

fn serve(config: Config) -> Result<(), String> {
    if config.providers.is_empty() {
        let [claude, chatgpt] = PROVIDERS.each_ref().map(|p| p.path(&config.state_dir));
        return Err(format!("found neither {claude:?} nor {chatgpt:?}; log in"));
    }
    start_log(config.log_level);
    let _lock = lock_state_dir(&config.state_dir)?;
    let mut gate = Gate::open(config)?;
    let served = gate.run();
    gate.cut_short();
    debug!("no refresh begins any more");
    // What a keeper or a cut-off request has begun must not be lost.
    for upstream in &gate.proxy.upstreams {
        let _ = catch_unwind(AssertUnwindSafe(|| upstream.credential.finish()));
    }
    info!("stopped");
    served
}

fn print(text: &str) -> Result<(), (u8, String)> {
    let printed = io::stdout().write_all(text.as_bytes());
    printed.map_err(|e| (1, format!("print: {e}")))
}

/// Creates the state folder, private, and locks it: two processes that spend the same single-use
/// token would end the login. The lock lives as long as the file that is returned.
fn lock_state_dir(folder: &Path) -> Result<File, String> {
    let name = folder.display();
    let created = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    let opened = created.and_then(|()| File::open(folder));
    let claim = opened.map_err(|e| format!("state_dir {name}: {e}"))?;
    match claim.try_lock() {
        Ok(()) => Ok(claim),
        Err(TryLockError::WouldBlock) => Err(format!("state_dir {name}: another ai-mux uses it")),
        Err(TryLockError::Error(e)) => Err(format!("state_dir {name} cannot be locked: {e}")),
    }
}

/// Takes a lock even if a thread panicked with it: what it guards is valid after each statement.
/// While one is held, nothing is waited for but a small local file and the log; only a credential's
/// `turn` is held for a whole refresh.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.into());
    thread.stack_size(STACK_SIZE).spawn(work).map(drop)
}

// ─── exchange ────────────────────────────────────────────────────────────────────────────────
// What the gate and the workers hand to each other, and what all threads share. In: a client's
// stream and a checked head. Out: at its end a line in the access log, and a verdict.

/// A client's request, from its head to its verdict.
struct Exchange {
    stream: Stream,
    head: Head,
    /// What `hold` read of the body; if that is all of it, it can be sent again.
    held: Cursor<Vec<u8>>,
    /// How much longer the body may be waited for: only time spent waiting for the client counts.
    patience: Duration,
    /// Why reading the body failed: ureq shows only an error of its own.
    body_error: Option<Reply>,
    started: Instant,
    /// `request_timeout`: for a free worker, and for the head of the answer from the request's end.
    timeout: Duration,
    report: Report,
}

/// What the access log will say of an exchange, beside its head.
#[derive(Default)]
struct Report {
    user: String,
    provider: &'static str,
    /// The answer's status, 0 until it begins; its body's bytes; and how soon its head was sent.
    status: u16,
    bytes: u64,
    first: Option<Duration>,
    request_id: Option<HeaderValue>,
}

impl Exchange {
    fn new(stream: Stream, head: Head, timeout: Duration) -> Exchange {
        Exchange {
            // When its head's first byte came or, pipelined, the answer before it ended.
            started: stream.socket.deadline - HEAD_TIME,
            stream,
            head,
            held: Cursor::default(),
            patience: BODY_GRACE,
            body_error: None,
            timeout,
            report: Report::default(),
        }
    }

    /// Sends the reply, if any, writes the log line, and decides what becomes of the stream.
    fn conclude(mut self, outcome: Outcome) -> Verdict {
        let mut last = !self.head.keep_alive || !self.head.body.is_done();
        let begun = self.report.status > 0; // then a reply can only be logged
        let (whole, ended) = match outcome {
            Ok(()) => (true, None),
            Err(end) if begun || end.status == 0 => (false, Some(end.message)),
            Err(reply) => {
                last |= reply.status == 401; // so that nobody tries one token after another on it
                let (answer, length) = reply.to_bytes(self.head.method == "HEAD", last);
                (self.report.status, self.report.bytes) = (reply.status, length);
                self.report.first = Some(self.started.elapsed());
                match self.stream.write_piece(&answer) {
                    Ok(()) => (true, (reply.status != 200).then_some(reply.message)),
                    Err(e) => (false, Some(format!("the client took no reply: {e}"))),
                }
            }
        };
        log_line(&self, ended);
        if whole && last {
            self.stream.half_close();
        }
        whole.then(|| self.stream.enter_gate())
    }
}

/// `Ok`: the client has its whole answer from upstream. Else the reply to send; with status 0, or
/// once an answer has begun, why the connection is broken off instead.
type Outcome = Result<(), Reply>;

/// After an answer, the client's stream: for its next head or, if `draining`, to be drained only.
/// `None`: closed without final chunk or TLS close_notify, so that the client sees it broken.
type Verdict = Option<Stream>;

/// What the gate, the workers and the keepers share.
struct Proxy {
    config: Config,
    upstreams: Vec<Upstream>,
    /// Exchanges that no worker has picked up yet: one for each ticket that is on its way.
    parked: Mutex<VecDeque<Exchange>>,
    /// Those of exchanges that are done, until the gate takes the streams back.
    verdicts: Mutex<Vec<Verdict>>,
    waker: UnixStream,
}

/// Set when a stop is about to close all upstream connections. From then on an answer's end, or a
/// fault of upstream's, may be the stop's doing, and no refresh begins.
static CUT: AtomicBool = AtomicBool::new(false);

// ─── gate ────────────────────────────────────────────────────────────────────────────────────
// In: client connections, verdicts, signals. Out: exchanges for the workers, whose heads are
// well-formed and have passed the handler's screening; and the replies that need no worker: health,
// refusals, and 503 when none is free. It is one thread, shares `Proxy` with the workers, and waits
// for all clients at once, never for one. Of a body it keeps what came with the head, and drains
// what still comes after a last answer.

struct Gate {
    proxy: &'static Proxy,
    /// `None` once a signal has come.
    listener: Option<TcpListener>,
    tls: Option<Tls>,
    /// How many connections there may be.
    capacity: usize,
    /// Those without an exchange, the quietest first.
    connections: Vec<Stream>,
    /// Exchanges that wait for a worker.
    queue: Vec<Exchange>,
    /// tiny_http, and the connection on which it gets a ticket for each exchange.
    server: &'static tiny_http::Server,
    inner: UnixStream,
    /// How many workers there may be: as configured or, if a thread could not be started, as many
    /// as there were then, until the next chores.
    max_workers: usize,
    /// How many there are.
    workers: usize,
    /// How many of them have an exchange.
    busy: usize,
    /// Gets a byte for each request that a worker is done with, and for each signal.
    wakes: UnixStream,
    stopping: Arc<AtomicBool>,
}

impl Gate {
    fn open(mut config: Config) -> Result<Gate, String> {
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let capacity = fit_to_descriptors(&mut config.workers);
        let (wakes, waker) = UnixStream::pair().map_err(failed("open a socket pair"))?;
        let stopping = catch_signals(&waker).map_err(failed("catch signals"))?;
        let (host, port) = &config.listen;
        let refused = |e| format!("listen on {host}:{port}: {e}");
        let listener = listen(host, *port).map_err(refused)?;
        let tls = config.tls.take();
        let roots = roots()?;
        let settings = std::mem::take(&mut config.providers).into_iter();
        let upstreams = settings.map(|each| Upstream::new(each, &config, &roots));
        // For all threads, as long as the process lives.
        let proxy: &'static _ = Box::leak(Box::new(Proxy {
            upstreams: upstreams.collect::<Result<_, _>>()?,
            config,
            parked: Mutex::default(),
            verdicts: Mutex::default(),
            waker,
        }));
        let failing = failed("start tiny_http on a socket in state_dir or TMPDIR");
        let (server, inner) = start_server(&proxy.config.state_dir).map_err(failing)?;
        for upstream in &proxy.upstreams {
            spawn("keeper", move || upstream.credential.keep()).map_err(failed("start keeper"))?;
        }
        let address = listener.local_addr().map_err(failed("read the port"))?;
        if proxy.config.users.is_empty() && !address.ip().is_loopback() {
            warn!("no users configured: whoever reaches {address} uses your subscription");
        }
        let secure = if tls.is_some() { "s" } else { "" };
        info!("listening on http{secure}://{address}");
        Ok(Gate {
            proxy,
            listener: Some(listener),
            tls,
            capacity,
            connections: Vec::new(),
            queue: Vec::new(),
            server,
            inner,
            max_workers: proxy.config.workers as usize,
            workers: 0,
            busy: 0,
            wakes,
            stopping,
        })
    }

    /// Serves until a signal comes and what then runs has ended, or had `STOP_TIME`; or until
    /// tiny_http is gone, without which nobody could be served.
    fn run(&mut self) -> Result<(), String> {
        let (mut stop_at, mut chores_at, mut warned) = (None, Instant::now(), false);
        while stop_at.is_none_or(|at| self.connection_count() > 0 && Instant::now() < at) {
            let polled = self.await_events(stop_at.map_or(chores_at, |at| chores_at.min(at)));
            let is_due = |stream: &mut Stream| stream.due_at() <= Instant::now();
            let due: Vec<_> = self.connections.extract_if(.., is_due).collect();
            for stream in due {
                // A panic would cost this connection, and no other.
                let _ = catch_unwind(AssertUnwindSafe(|| self.read_on(stream)));
            }
            if stop_at.is_none() && self.stopping.load(Ordering::SeqCst) {
                info!("stopping; running requests and refreshes may end first");
                (self.listener, stop_at) = (None, Some(Instant::now() + STOP_TIME));
                self.connections.retain(|s| s.draining);
            }
            let verdicts = std::mem::take(&mut *lock(&self.proxy.verdicts));
            self.busy -= verdicts.len();
            self.connections.extend(verdicts.into_iter().flatten());
            self.dispatch().map_err(|e| format!("tiny_http: {e}"))?;
            let admitted = polled.and_then(|ready| if ready { self.accept() } else { Ok(()) });
            if let Err(e) = &admitted {
                let level = if warned { Level::Debug } else { Level::Warn };
                log!(level, "new connections wait: {e}");
                self.make_room(); // poll, too, fails above the descriptor limit
                thread::sleep(ACCEPT_PAUSE);
            }
            warned = admitted.is_err();
            if chores_at <= Instant::now() {
                chores_at = Instant::now() + CHORE_INTERVAL;
                // End idle workers: a thread keeps every page its stack ever grew to.
                (self.busy..self.workers).for_each(|_| self.server.unblock());
                self.workers = self.busy;
                self.max_workers = self.proxy.config.workers as usize;
                self.tls.iter_mut().for_each(Tls::renew);
            }
            if stop_at.is_some() {
                // What verdicts have brought back gets no other request.
                let open = self.connections.iter_mut().filter(|s| !s.draining);
                open.for_each(Stream::half_close);
            }
        }
        Ok(())
    }

    /// Ends what has not ended by itself; what is connected to upstream gets its log line.
    fn cut_short(&mut self) {
        // Refuse what is still queued, unless a worker is free.
        let expire = |exchange: &mut Exchange| exchange.stream.socket.deadline = Instant::now();
        self.queue.iter_mut().for_each(expire);
        let _ = self.dispatch();
        self.connections.clear();
        if self.busy > 0 {
            warn!("{} requests are still running and are cut short", self.busy);
        }
        CUT.store(true, Ordering::SeqCst);
        let agents = self.proxy.upstreams.iter().map(|u| u.agent.clone());
        agents.for_each(ureq::Agent::shutdown); // which ends each wait on a connection
        let end = Instant::now() + CUT_TIME;
        while self.busy > 0 && Instant::now() < end {
            let _ = self.await_events(end);
            self.busy -= std::mem::take(&mut *lock(&self.proxy.verdicts)).len();
        }
    }

    fn connection_count(&self) -> usize {
        self.connections.len() + self.queue.len() + self.busy
    }

    /// Waits until something happens or is due, at most `until`; a readable connection is then due.
    /// Says whether a client can be accepted.
    fn await_events(&mut self, until: Instant) -> io::Result<bool> {
        let waiting = self.queue.first().map(|e| e.stream.socket.deadline);
        let dues = self.connections.iter().map(Stream::due_at).chain(waiting);
        let time = left_until(dues.fold(until, Instant::min)).try_into().ok();

        let mut sources = vec![PollFd::new(&self.wakes, PollFlags::IN)];
        let clients = self.connections.iter().map(|s| &s.socket.tcp);
        sources.extend(clients.map(|tcp| PollFd::new(tcp, PollFlags::IN)));
        sources.extend(self.listener.iter().map(|l| PollFd::new(l, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut sources, time.as_ref()))?;
        let ready: Vec<_> = sources.iter().map(|s| !s.revents().is_empty()).collect();
        if ready[0] {
            let _ = (&self.wakes).read(&mut [0; 64]);
        }
        for (stream, readable) in self.connections.iter_mut().zip(&ready[1..]) {
            stream.must_read |= readable;
        }
        Ok(ready.get(1 + self.connections.len()) == Some(&true))
    }

    fn accept(&mut self) -> io::Result<()> {
        if self.connection_count() >= self.capacity && !self.make_room() {
            return Err(io::Error::other("all are busy; raise workers or ulimit -n"));
        }
        let (tcp, peer) = match self.listener.as_ref().map(TcpListener::accept) {
            None => return Ok(()),
            Some(Err(e)) if e.kind() == ErrorKind::WouldBlock => return Ok(()), // it has gone again
            Some(accepted) => accepted?,
        };
        tcp.set_nonblocking(true)?;
        tcp.set_nodelay(true)?;
        let new_session = |tls: &Tls| rustls::ServerConnection::new(tls.config.clone());
        let session = self.tls.as_ref().map(new_session).transpose();
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let stream = Stream::new(tcp, peer, session.map_err(io::Error::other)?);
        self.connections.push(stream);
        Ok(())
    }

    /// Closes the connection that has been quiet longest, if there is one.
    fn make_room(&mut self) -> bool {
        self.connections.extract_if(.., |_| true).next().is_some() // the others stay
    }

    /// Reads on what a client sends. A whole head begins an exchange.
    fn read_on(&mut self, mut stream: Stream) {
        let peer = stream.peer;
        let (head, read) = match stream.next_head() {
            Ok(Some(head)) => (head, Ok(())),
            Ok(None) => return self.connections.push(stream),
            Err(end) if end.status == 0 => return debug!("peer={peer} closed: {}", end.message),
            Err(reply) => (Head::default(), Err(reply)), // closes: keep_alive is false
        };
        let mut exchange = Exchange::new(stream, head, self.proxy.config.request_timeout);
        let screened = read.and_then(|()| self.proxy.screen(&mut exchange));
        if screened.is_err() {
            return self.connections.extend(exchange.conclude(screened));
        }
        exchange.stream.socket.deadline = Instant::now() + exchange.timeout;
        self.queue.push(exchange);
    }

    /// Parks an exchange, with a ticket, for each worker that has none; refuses exchanges that have
    /// waited too long.
    fn dispatch(&mut self) -> io::Result<()> {
        if !self.queue.is_empty() {
            self.start_workers();
        }
        let count = self.queue.len().min(self.workers - self.busy);
        lock(&self.proxy.parked).extend(self.queue.drain(..count));
        self.busy += count;
        self.inner.write_all(&TICKET.repeat(count))?;
        let late = |e: &mut Exchange| e.stream.socket.deadline <= Instant::now();
        for exchange in self.queue.extract_if(.., late) {
            let mut full = Reply::new(503, "no worker was free; try again, or raise `workers`");
            full.retry_after = Some(Duration::from_secs(1));
            self.connections.extend(exchange.conclude(Err(full)));
        }
        Ok(())
    }

    /// Starts as many as are needed and some to spare, as long as there may be more.
    fn start_workers(&mut self) {
        let wanted = self.busy + self.queue.len() + SPARE_WORKERS;
        while self.workers < wanted.min(self.max_workers) {
            let (server, proxy) = (self.server, self.proxy);
            let work = move || loop {
                match server.recv() {
                    Ok(ticket) => serve_next(proxy, ticket),
                    Err(e) if e.kind() == ErrorKind::Other => return, // from `unblock`
                    Err(_) => {} // from accept(2), where nobody connects any more
                }
            };
            if let Err(e) = spawn("worker", work) {
                let idle = self.busy < self.workers; // then it is not urgent
                let level = if idle { Level::Debug } else { Level::Warn };
                self.max_workers = self.workers;
                return log!(level, "start a worker: {e}");
            }
            self.workers += 1;
        }
    }
}

// ─── gate: the start ─────────────────────────────────────────────────────────────────────────
// In: the configuration, and what the process may do. Out: what the gate starts with: its bounds,
// its signals, its listener, and the TLS settings, which are read again when their files change.

/// Raises the descriptor limit if it may, and lowers `workers` to what it carries. Returns how many
/// client connections there may be.
fn fit_to_descriptors(workers: &mut u64) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limits = getrlimit(Resource::Nofile);
    limits.current = limits.maximum;
    let _ = setrlimit(Resource::Nofile, limits); // the next line tells what came of it
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let rest = limit.saturating_sub(SPARE_DESCRIPTORS);
    // Two clients for each: the one that it serves, and one that waits or asks for health.
    let most = (rest / (WORKER_DESCRIPTORS + 2)).max(1);
    if most < *workers {
        warn!("raise the limit of {limit} open files: it carries {most} workers, not {workers}");
        *workers = most;
    }
    let rest = rest.saturating_sub(*workers * WORKER_DESCRIPTORS).max(1);
    rest.min(*workers + SPARE_CONNECTIONS) as usize
}

/// The first SIGTERM or SIGINT sets the flag and wakes the gate; the second ends the process at
/// once, with exit code 1.
fn catch_signals(waker: &UnixStream) -> io::Result<Arc<AtomicBool>> {
    use signal_hook::{consts, flag, low_level};
    let seen = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGTERM, consts::SIGINT] {
        flag::register_conditional_shutdown(signal, 1, seen.clone())?;
        flag::register(signal, seen.clone())?;
        low_level::pipe::register(signal, waker.try_clone()?)?;
    }
    Ok(seen)
}

/// Listens on the first address of the host that works, IPv4 first. If one is in use, no other is
/// tried: half of the clients would reach another server. `[::]` takes IPv4 as well, whatever
/// net.ipv6.bindv6only says: hence not `TcpListener::bind`.
fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    use rustix::net::{SocketAddrAny, SocketType, bind, listen, socket, sockopt};
    let open = |address: SocketAddr| {
        let family = SocketAddrAny::from(address).address_family();
        let socket = socket(family, SocketType::STREAM, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        let _ = sockopt::set_ipv6_v6only(&socket, false); // an IPv4 one has no such option
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        let listener = TcpListener::from(socket);
        listener.set_nonblocking(true).map(|()| listener)
    };
    let host = host.trim_matches(['[', ']']);
    let mut addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    // For a host without IPv6.
    addresses.extend((host == "::").then_some(SocketAddr::from(([0; 4], port))));
    let none = Err(ErrorKind::NotFound.into());
    addresses.into_iter().fold(none, |tried, next| match tried {
        Err(e) if e.kind() != ErrorKind::AddrInUse => open(next),
        _ => tried,
    })
}

/// The TLS settings for clients, and the files that they come from: certificate and key.
struct Tls {
    files: [PathBuf; 2],
    /// How they looked when this was read from them.
    seen: [Option<Stamp>; 2],
    config: Arc<rustls::ServerConfig>,
    /// The last failure that was logged: the files' stamps then, and why.
    logged: ([Option<Stamp>; 2], String),
}

impl Tls {
    fn open(files: [PathBuf; 2]) -> Result<Tls, String> {
        let seen = files.each_ref().map(|file| stamp(file));
        let [cert, key] = &files;
        let chain = certificates(cert).map_err(|e| format!("cert_path: {e}"))?;
        let (cert, name) = (cert.display(), key.display());
        let pem = fs::read(key).map_err(|e| format!("key_path: {name}: {e}"))?;
        // The parser's own error could quote the key.
        let no_key = |_| format!("key_path: {name}: found no private key, expected PEM");
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(no_key)?;
        let builder = rustls::ServerConfig::builder().with_no_client_auth();
        let not_a_pair = |e| format!("key_path: {name}: is not the key of {cert}: {e}");
        let mut config = builder.with_single_cert(chain, key).map_err(not_a_pair)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
        Ok(Tls {
            files,
            seen,
            config: Arc::new(config),
            logged: Default::default(),
        })
    }

    /// Reads the certificate and its key again, if their files have changed.
    fn renew(&mut self) {
        let now = self.files.each_ref().map(|file| stamp(file));
        if now == self.seen {
            return self.logged = Default::default();
        }
        match Tls::open(self.files.clone()) {
            Ok(tls) => {
                info!("tls: {} is in use", tls.files[0].display());
                *self = tls;
            }
            Err(e) if self.logged == (now, e.clone()) => {} // logged already; tried until it passes
            Err(e) => {
                error!("tls.{e}; the old certificate stays in use");
                self.logged = (now, e);
            }
        }
    }
}

// ─── gate: the head ──────────────────────────────────────────────────────────────────────────
// In: the bytes of one head. Out: its parts, checked (RFC 9112 sections 2 to 6), or a reply.
// Stricter than the RFC where another reader could understand something else: no control
// character but the tab, no bare LF, no folding, one length, one Host.

#[derive(Default)]
struct Head {
    method: String,
    /// Origin form, as sent: path and query.
    target: String,
    fields: HeaderMap,
    http10: bool,
    body: Body,
    /// The client waits for a 100 Continue (RFC 9110 section 10.1.1).
    expect: bool,
    /// The connection may serve another request after this one.
    keep_alive: bool,
}

impl Head {
    /// Takes the head at the start of what is `buffered`, once it is whole.
    fn take(buffered: &mut VecDeque<u8>) -> Result<Option<Head>, Reply> {
        // An empty line before a request is ignored (RFC 9112 section 2.2), one at each reading.
        if buffered.iter().take(2).eq(b"\r\n") {
            buffered.drain(..2);
        }
        let bytes = &*buffered.make_contiguous();
        let mut fields = [httparse::EMPTY_HEADER; FIELD_COUNT];
        let mut request = httparse::Request::new(&mut fields);
        let too_large = |head: &[u8]| {
            let mut lines = head.split(|b| *b == b'\n');
            head.len() > HEAD_SIZE || lines.any(|line| line.len() > LINE_SIZE)
        };
        let length = match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) if !too_large(&bytes[..length]) => Ok(length),
            Ok(httparse::Status::Partial) if !too_large(bytes) => return Ok(None),
            Ok(_) | Err(httparse::Error::TooManyHeaders) => Err(head_too_large()),
            Err(_) if too_large(bytes) => Err(head_too_large()),
            Err(_) if bytes.starts_with(b"\x16") => Err(malformed("https, but this port is http")),
            Err(e) => Err(malformed(&e.to_string())),
        }?;
        let mut lines = bytes[..length].split_inclusive(|b| *b == b'\n');
        // httparse takes a bare LF as well, and empty lines before the first.
        if bytes.starts_with(b"\r") || !lines.all(|l| l.is_ascii() && l.ends_with(b"\r\n")) {
            return Err(malformed("no request line, a bare LF, or not ASCII"));
        }
        let checked = |field: &httparse::Header| {
            let name = HeaderName::try_from(field.name).ok();
            name.zip(HeaderValue::from_bytes(field.value).ok())
        };
        let fields: Option<HeaderMap> = request.headers.iter().map(checked).collect();
        let fields = fields.ok_or_else(|| malformed("a header's name or value is not valid"))?;
        let http10 = request.version == Some(0);
        let head = Head {
            method: request.method.unwrap_or_default().to_owned(),
            target: request.path.unwrap_or_default().to_owned(),
            body: Body::of(&fields).map_err(malformed)?,
            http10,
            expect: !http10 && lists(&fields, "expect", "100-continue"),
            keep_alive: !http10 && !lists(&fields, "connection", "close"),
            fields,
        };
        head.check().map_err(malformed)?;
        buffered.drain(..length);
        buffered.shrink_to_fit(); // it may wait long for a worker
        Ok(Some(head))
    }

    /// Why it cannot be passed on, although httparse accepted each part.
    fn check(&self) -> Result<(), &'static str> {
        let (method, target) = (self.method.as_str(), self.target.as_str());
        let capitals = method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
        // What http::Uri takes in a query; '#' would begin a fragment.
        let in_targets = |b| matches!(b, 0x21 | 0x24..=0x3b | 0x3d | 0x3f..=0x7e);
        let hosts: Vec<_> = items(&self.fields, "host").collect();
        let in_hosts = |b: u8| b.is_ascii_alphanumeric() || b"-._~:[]%".contains(&b);
        match method {
            // TRACE would have the upstream send our token back to the client.
            "TRACE" | "TRACK" | "CONNECT" => Err("the method is not one that can be passed on"),
            _ if !capitals || method.len() >= USER_TOKEN_LENGTH => Err("the method is not valid"),
            _ if !target.starts_with('/') => Err("the target must be a path"),
            _ if !target.bytes().all(in_targets) => Err("the target must be percent-encoded"),
            _ if hosts.is_empty() && !self.http10 => Err("the Host header is missing"),
            // Two are joined by a comma, which no host has.
            _ if !hosts.join(",").bytes().all(in_hosts) => Err("Host is not one host name"),
            "HEAD" if !self.body.is_done() => Err("a HEAD request must have no body"),
            _ if self.http10 && self.body.chunked => Err("HTTP/1.0 needs a Content-Length"),
            _ => Ok(()),
        }
    }
}

fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// The items of a field that is a list (RFC 9110 section 5.6.1), over all its lines.
fn items<'a>(fields: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    let lines = fields.get_all(name).into_iter();
    let lines = lines.filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}

fn lists(fields: &HeaderMap, name: &str, item: &str) -> bool {
    items(fields, name).any(|found| found.eq_ignore_ascii_case(item))
}

// ─── server ──────────────────────────────────────────────────────────────────────────────────
// In: tickets from tiny_http, and the exchanges parked for them. Out: for each exchange, whatever
// happens to it, a verdict and a line in the access log. A panic in the handler ends here: it costs
// an answer, not a worker.

/// What tiny_http gets for each exchange: the worker that receives it serves the exchange parked
/// longest. All are alike: if tiny_http hands out the one sent at start, it hands out every one.
const TICKET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// Starts tiny_http, and proves the inner connection with a first ticket. Its ends meet at a socket
/// in a private folder, removed at once: in `state_dir`, or with the temporary files where that is
/// read-only or its path too long for a socket address (107 bytes, unix(7)).
fn start_server(state_dir: &Path) -> io::Result<(&'static tiny_http::Server, UnixStream)> {
    let meet = |folder: PathBuf| {
        let socket = folder.join("socket");
        let remove = || fs::remove_file(&socket).and(fs::remove_dir(&folder));
        let _ = remove(); // left behind by kill -9
        DirBuilder::new().mode(0o700).create(&folder)?;
        let server = tiny_http::Server::http_unix(&socket).map_err(io::Error::other);
        let inner = UnixStream::connect(&socket);
        let _ = remove();
        Ok::<_, io::Error>((server?, inner?))
    };
    let temporary = std::env::temp_dir().join(format!("ai-mux-{}", std::process::id()));
    let (server, mut inner) = meet(state_dir.join("inner")).or_else(|_| meet(temporary))?;
    inner.write_all(TICKET)?;
    let ticket = server.recv_timeout(PICKUP_TIME)?;
    drop(ticket.ok_or(ErrorKind::TimedOut)?.into_writer());
    // From here on never dropped: its Drop would connect to whatever has the socket's name then.
    Ok((Box::leak(Box::new(server)), inner))
}

/// Serves the exchange that has been parked longest.
fn serve_next(proxy: &Proxy, ticket: tiny_http::Request) {
    let exchange = lock(&proxy.parked).pop_front();
    let handle = |exchange: &mut Exchange| match proxy.handle(exchange) {
        Err(end) if CUT.load(Ordering::SeqCst) => {
            let message = "a stop of ai-mux cut it short; try again".into();
            Err(Reply { message, ..end })
        }
        outcome => outcome,
    };
    let verdict = exchange.and_then(|e| fence(e, handle));
    lock(&proxy.verdicts).push(verdict);
    drop(ticket.into_writer()); // or tiny_http would answer the ticket, with a 500
    let _ = (&proxy.waker).write(&[0]);
}

/// Brings an exchange to its verdict, whatever happens: a panic is 500 if nothing was sent yet,
/// else a broken answer.
fn fence(mut exchange: Exchange, handle: impl FnOnce(&mut Exchange) -> Outcome) -> Verdict {
    exchange.stream.socket.blocking = true;
    let handled = catch_unwind(AssertUnwindSafe(|| handle(&mut exchange)));
    let fault = |_| Err(Reply::new(500, "an internal error of ai-mux; see its log"));
    let outcome = handled.unwrap_or_else(fault);
    let concluded = catch_unwind(AssertUnwindSafe(|| exchange.conclude(outcome)));
    concluded.unwrap_or_default()
}

// ─── handler ─────────────────────────────────────────────────────────────────────────────────
// In: an exchange, whose head is well-formed. Out: the answer, on the exchange's stream, or a
// reply. `screen` runs in the gate, `handle` in a worker. The order of the steps is the policy:
// nobody without a token learns which paths exist, and no worker, no byte of the body and no
// refresh is spent on what is refused anyway.

impl Proxy {
    /// What the gate can tell by the head alone. `Ok`: it takes a worker; else the gate's own
    /// answer, which may be 200.
    fn screen(&self, exchange: &mut Exchange) -> Result<(), Reply> {
        let users = &self.config.users;
        if has_token(path_of(&exchange.head.target).as_bytes(), users) {
            exchange.head.target = "(a token)".into(); // for the log; and 404
        }
        let (head, peer) = (&exchange.head, exchange.stream.peer);
        debug!("peer={peer} request: {}", shown(&head.fields, users));
        // Answered without a token. Claude Code opens its connections with HEAD /claude/api/hello.
        let (method, path) = (head.method.as_str(), path_of(&head.target));
        let probed = ["/", "/claude", "/claude/api/hello", "/chatgpt", "/healthz"].contains(&path);
        if method == "HEAD" && probed || method == "GET" && path == "/healthz" {
            return Err(Reply::new(200, self.health()));
        }
        exchange.report.user = self.authenticate(&head.fields)?.to_owned();
        exchange.report.provider = self.route(&head.target)?.0.provider.name;
        if lists(&head.fields, "upgrade", "websocket") {
            return Err(Reply::new(426, "no WebSocket here; use plain HTTP"));
        }
        let large = head.body.left > BODY_SIZE;
        if large { Err(body_too_large()) } else { Ok(()) }
    }

    /// What a worker does for a request that has passed the gate.
    fn handle(&self, exchange: &mut Exchange) -> Outcome {
        let (upstream, url) = self.route(&exchange.head.target)?;
        upstream.credential.usable_login(None)?; // before the body, which may take minutes
        exchange.hold()?;
        let login = upstream.credential.usable_login(None)?;
        let whole = exchange.head.body.is_done();
        let mut answer = upstream.send(&url, &login, exchange)?;
        // A token that is refused is refreshed even if this request cannot be sent again.
        if answer.status() == http::StatusCode::UNAUTHORIZED
            && let Ok(newer) = upstream.credential.usable_login(Some(&login.access))
            && newer.access != login.access
            && whole
        {
            exchange.held.set_position(0);
            answer = upstream.send(&url, &newer, exchange)?;
        }
        // The answer may take long.
        exchange.held = Cursor::default();
        exchange.stream.buffered.shrink_to_fit();
        relay(answer, exchange, self)
    }

    /// The user's name. All tokens given must be the same, and a user's. How long this takes tells
    /// neither how much of a token matched, nor whose.
    fn authenticate(&self, fields: &HeaderMap) -> Result<&str, Reply> {
        if self.config.users.is_empty() {
            // A web page must not use the subscription of whoever looks at it.
            if fields.contains_key("origin") {
                return Err(Reply::new(403, "web pages need a token; configure `users`"));
            }
            return Ok("-");
        }
        let bearers = fields.get_all(AUTHORIZATION).iter().map(bearer_in);
        let keys = fields.get_all("x-api-key").iter();
        let mut given = bearers.chain(keys.map(HeaderValue::as_bytes));
        let token = given.next().unwrap_or_default();
        let agreed = given.all(|other| other == token);
        let owns_it = |user: &&User| user.token.expose().as_bytes().ct_eq(token).into();
        let owners: Vec<_> = self.config.users.iter().filter(owns_it).collect(); // no early end
        // Claude Code (2.1.332) shows "Not logged in" in place of any error that names x-api-key.
        let advice = "wrong or no token for ai-mux, or two of them; send one, as bearer or API key";
        let user = owners.first().filter(|_| agreed).map(|user| &*user.name);
        user.ok_or_else(|| Reply::new(401, advice))
    }

    /// The upstream for a target, and the URL there. Nothing is decoded, and no segment is
    /// accepted that an upstream could decode to something else.
    fn route(&self, target: &str) -> Result<(&Upstream, String), Reply> {
        let literal = |b: u8| b.is_ascii_alphanumeric() || b"-._~:@".contains(&b);
        let usual = |s: &&str| !matches!(*s, "" | "." | "..") && s.bytes().all(literal);
        let segments: Vec<_> = path_of(target).split('/').skip(1).collect();
        if segments.iter().all(usual)
            && let [name, "v1", first, ..] = segments[..]
            && !first.eq_ignore_ascii_case("oauth") // where a token manages its login
            && let Some(upstream) = self.upstreams.iter().find(|u| u.provider.name == name)
            && let Some((_, rest)) = target.split_once("/v1/")
        {
            let (base, prefix) = (&upstream.settings.base_url, upstream.provider.prefix);
            let url = format!("{}{prefix}{rest}", base.trim_end_matches('/'));
            return Ok((upstream, url));
        }
        let advice = "no such path; use /claude/v1/... or /chatgpt/v1/..., where configured";
        Err(Reply::new(404, advice))
    }

    /// Which providers can serve, and nothing secret: JSON.
    fn health(&self) -> String {
        let word = |ready| if ready { "ready" } else { "unavailable" };
        let state = |u: &Upstream| (u.provider.name, word(u.credential.is_ready()));
        let states: BTreeMap<_, _> = self.upstreams.iter().map(state).collect();
        json!({ "status": "ok", "providers": states }).to_string()
    }
}

/// The token that an Authorization offers: empty, if it is not of the one right form.
fn bearer_in(value: &HeaderValue) -> &[u8] {
    match value.as_bytes().split_at_checked("bearer ".len()) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
        _ => b"",
    }
}

// ─── credential ──────────────────────────────────────────────────────────────────────────────
// In: a provider's credential file, which the vendor's own tools may rewrite at any moment; the
// token endpoint's answers. Out: a login that is good now, or why there is none. Any thread may
// read the file; to refresh the login or write the file, a worker, the provider's keeper, or main
// at the end, waits for its turn.
// What cannot happen: two refreshes at once; a new login used before a save was tried; a file half
// written, or made anew after a log-out.

struct Credential {
    provider: &'static Provider,
    path: PathBuf,
    token_url: String,
    agent: ureq::Agent,
    /// `refresh_check_interval`.
    interval: Duration,
    /// Held by whoever refreshes the login or writes the file, for as long as that takes.
    turn: Mutex<()>,
    /// What everyone looks at, in short locks.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The one in use.
    login: Option<Login>,
    /// How the file looked when it last held a login.
    seen: Option<Stamp>,
    /// Whether a file that looks like `seen` need not be read.
    settled: bool,
    /// The last refresh that brought a login.
    last: Option<Refresh>,
    /// Whether that login is still to be written to disk.
    unsaved: bool,
    /// The last wait after a failed refresh or save, but for a longer `Retry-After`.
    backoff: Duration,
    failure: Option<Outage>,
}

#[derive(Clone)]
struct Refresh {
    /// The refresh token that it spent, then those spent to get that one, newest first: no `None`.
    spent: Vec<Option<Secret>>,
    /// What it brought.
    login: Login,
    at: SystemTime,
}

/// Why there is no login, or no new one, or why it is not on disk.
#[derive(Clone, PartialEq)]
struct Outage {
    why: String,
    /// When to try again; `None`: when the file changes.
    until: Option<Instant>,
}

/// Why a refresh failed, and the least wait for the next; `None`: until the file changes.
type RefreshError = (String, Option<Duration>);

/// What a credential file holds.
#[derive(Clone, PartialEq)]
struct Login {
    access: Secret,
    /// Spent by a refresh, which brings the next one.
    refresh: Option<Secret>,
    /// When `access` ends; `None`: once upstream answers 401.
    expires: Option<SystemTime>,
    account: Option<Secret>,
    /// The id_token, for the vendor's own tool.
    id: Option<Secret>,
}

impl Credential {
    /// A login to use now; not the one whose access token upstream `rejected`, if there can be
    /// another. Whoever finds it ageing first refreshes it, while the others use it; once it has
    /// expired or was rejected, all wait for that refresh.
    fn usable_login(&self, rejected: Option<&Secret>) -> Result<Login, Reply> {
        let mut state = self.reload(false);
        if let Some(old) = state.due(REFRESH_MARGIN, rejected).cloned() {
            drop(state);
            let still_good = old.lasts(Duration::ZERO) && rejected != Some(&old.access);
            let turn = match self.turn.try_lock().ok() {
                Some(turn) => turn,
                // Another thread refreshes it; or one panicked with the turn, and the keeper will.
                None if still_good => return Ok(old),
                None => lock(&self.turn),
            };
            self.refresh_if_due(turn, REFRESH_MARGIN, rejected);
            state = self.reload(false);
        }
        let dead = |why: &str| Reply::new(503, format!("ai-mux has no login to use: {why}"));
        let usable = |login: &&Login| login.lasts(Duration::ZERO) || state.is_young(login);
        match (&state.failure, state.login.as_ref().filter(usable)) {
            (Some(Outage { why, until: None }), _) => Err(dead(why)),
            (_, Some(login)) => Ok(login.clone()),
            (Some(Outage { why, until }), None) => {
                let why = format!("the login could not be refreshed: {why}; wait and try again");
                let mut later = Reply::new(503, why);
                later.retry_after = until.map(|at| left_until(at) + Duration::from_secs(1));
                Err(later)
            }
            (None, None) => Err(dead(&format!("it has expired; {}", self.remedy()))),
        }
    }

    fn is_ready(&self) -> bool {
        let state = self.reload(false);
        let down = matches!(state.failure, Some(Outage { until: None, .. }));
        let may_refresh = |login: &Login| state.failure.is_none() && login.refresh.is_some();
        let usable = |login: &Login| login.lasts(Duration::ZERO) || may_refresh(login);
        !down && state.login.as_ref().is_some_and(usable)
    }

    /// What the keeper does: looks at the login every `interval`, and when a failed refresh or
    /// save is to be tried again.
    fn keep(&self) {
        let mut next = Instant::now();
        while !CUT.load(Ordering::SeqCst) {
            let retry = lock(&self.state).failure.as_ref().and_then(|f| f.until);
            if retry.unwrap_or(next).min(next) <= Instant::now() {
                next = Instant::now() + self.interval;
                let _ = catch_unwind(AssertUnwindSafe(|| self.look()));
            }
            thread::sleep(self.interval.min(BACKOFF_MIN)); // no back-off is shorter
        }
    }

    /// Waits for its turn, saves what is unsaved, and refreshes what is due before the next look.
    fn look(&self) {
        let turn = lock(&self.turn);
        self.save();
        self.refresh_if_due(turn, self.interval + REFRESH_MARGIN, None);
    }

    /// At the end: waits for a refresh that runs, saves what is unsaved, and tells what is lost.
    fn finish(&self) {
        drop(self.reload(true)); // if a spent login was put back, ours is then unsaved again
        self.look();
        if lock(&self.state).unsaved {
            let (name, remedy) = (self.provider.name, self.remedy());
            error!("{name}: the new login could not be saved and is lost; {remedy}");
        }
    }

    /// Holds the turn until it is done.
    fn refresh_if_due(&self, _turn: MutexGuard<()>, margin: Duration, rejected: Option<&Secret>) {
        // A closure, since `while let` would hold the lock for as long as its block.
        let due = || self.reload(true).due(margin, rejected).cloned();
        // Looks again after each try: the file may have another login by then, which wins, and may
        // be due as well.
        while let Some(old) = due() {
            if let Err((why, least)) = self.refresh(&old) {
                // Another tool may have refreshed it meanwhile; then that login is the newer one.
                let mut state = self.reload(true);
                if state.login.as_ref() == Some(&old) {
                    self.fail(&mut state, why, least);
                }
            }
        }
    }

    /// Spends a refresh token, but first makes sure that what it brings can be saved.
    fn refresh(&self, old: &Login) -> Result<(), RefreshError> {
        let temporary = |why| (why, Some(Duration::ZERO));
        if lock(&self.state).unsaved {
            self.save(); // the login that the last refresh brought comes first
            return Ok(());
        }
        // Locked until we return: an ai-mux with another state_dir may have a link to it.
        let claim = File::open(&self.path).ok();
        let claimed = claim.as_ref().map(File::try_lock);
        if matches!(claimed, Some(Err(TryLockError::WouldBlock))) {
            let why = "another ai-mux is refreshing it, or another program has locked its file";
            return Err(temporary(why.into()));
        }
        let size = fs::metadata(&self.path).map_or(0, |meta| meta.len());
        // The most that the new file can have; one over FILE_SIZE is refused anyway.
        let blanks = " ".repeat((size.min(FILE_SIZE) + REFRESH_SIZE) as usize);
        self.replace(&blanks, None).map_err(temporary)?;
        // The file must be whole, as the new tokens are edited into it; and if another tool changed
        // its login during the rehearsal, that login holds.
        let (.., on_disk) = self.read().map_err(|e| temporary(e.to_string()))?;
        if on_disk != *old {
            return Ok(());
        }
        let login = self.request_token(old)?;
        let mut state = lock(&self.state);
        let led_here = state.last.take().filter(|l| l.login.refresh == old.refresh);
        let mut spent = vec![old.refresh.clone()];
        spent.extend(led_here.into_iter().flat_map(|last| last.spent));
        spent.dedup(); // where the endpoint keeps the token
        spent.truncate(SPENT_COUNT);
        let at = SystemTime::now();
        state.last = Some(Refresh { spent, login, at });
        state.unsaved = true;
        drop(state);
        self.save();
        Ok(())
    }

    /// Asks the token endpoint. Of its answer, only status and `error` word are ever shown.
    fn request_token(&self, old: &Login) -> Result<Login, RefreshError> {
        let (provider, url, via) = (self.provider, &self.token_url, via(&self.agent));
        let temporary = |e: &dyn Display| (format!("{url}{via}: {e}"), Some(Duration::ZERO));
        // In JSON, as the vendors' own tools send it, not in the form of RFC 6749 section 6.
        let mut grant: Value = provider.grant.iter().copied().collect();
        grant["grant_type"] = "refresh_token".into();
        grant["refresh_token"] = old.refresh.as_ref().map(Secret::expose).into();
        WAIT_END.set(Instant::now() + REFRESH_TIME);
        let request = self.agent.post(url).content_type("application/json");
        let mut answer = request.send(grant.to_string()).map_err(|e| temporary(&e))?;
        let (status, wait) = (answer.status().as_u16(), retry_after(answer.headers()));
        let mut text = Vec::new(); // of an answer that breaks off, too: its JSON may be whole
        let mut body = answer.body_mut().as_reader().take(REFRESH_SIZE);
        let _ = body.read_to_end(&mut text);
        if !answer.status().is_success() {
            let json: Value = serde_json::from_slice(&text).unwrap_or_default();
            let word = error_word(&json);
            let terminal = (provider.is_terminal)(status, word);
            let why = format!("{url} answered {status} {word}").trim_end().into();
            return Err((why, (!terminal).then(|| wait.unwrap_or_default())));
        }
        let tokens: TokenAnswer = serde_json::from_slice(&text).unwrap_or_default();
        let new = secret_in(&tokens.refresh_token);
        // What the answer leaves out stays as it was; it must bring a new token, of either kind.
        let access = secret_in(&tokens.access_token).or(new.as_ref().map(|_| old.access.clone()));
        let access = access.ok_or_else(|| temporary(&"the answer is cut off, or has no token"))?;
        let seconds = tokens.expires_in.as_f64();
        let believed = seconds.map(|seconds| seconds.clamp(LIFETIME_MIN, LIFETIME_MAX));
        let expires = believed.map(|s| SystemTime::now() + Duration::from_secs_f64(s));
        Ok(Login {
            expires: expires.or_else(|| time_in(&claims(&access)["exp"])),
            refresh: new.or(old.refresh.clone()),
            account: old.account.clone(),
            id: secret_in(&tokens.id_token).or(old.id.clone()),
            access,
        })
    }

    /// Puts an unsaved login on disk, then into use; or only into use, if that fails.
    fn save(&self) {
        let unsaved = |state: &State| state.last.clone().filter(|_| state.unsaved);
        let Some(last) = unsaved(&lock(&self.state)) else {
            return;
        };
        let saved = self.write(&last).or_else(|_| {
            thread::sleep(SAVE_PAUSE);
            self.write(&last)
        });
        let mut state = self.reload(true);
        match saved {
            _ if !state.unsaved => {} // another login in the file, or a log-out, has won
            Ok(login) => {
                info!("{}: refreshed", self.provider.name);
                state.take_over(Ok(login));
            }
            Err(why) => {
                state.login = Some(last.login);
                let why = format!("the new login is in memory only, so do not stop ai-mux: {why}");
                self.fail(&mut state, why, Some(Duration::ZERO));
            }
        }
    }

    /// Writes a new login over a spent one. Returns what the file then has, which may be another.
    fn write(&self, Refresh { spent, login, .. }: &Refresh) -> Result<Login, String> {
        let (before, mut json, on_disk) = self.read().map_err(|e| e.to_string())?;
        // An earlier write may have failed only after the rename, as the folder was synced.
        let placed = on_disk.refresh == login.refresh && on_disk.access == login.access;
        if spent.contains(&on_disk.refresh) && !placed {
            self.provider.edit(&mut json, login);
            self.replace(&json.to_string(), Some(before))?;
        }
        Ok(self.provider.login_in(&json).unwrap_or(on_disk))
    }

    /// Replaces the file whole, through links: a new one is written beside it, synced, and renamed
    /// over it, if it still looks as `before`. `None` rehearses: all is done but the rename.
    fn replace(&self, text: &str, before: Option<Stamp>) -> Result<(), String> {
        let (name, folder) = (self.path.display(), self.folder());
        let failed =
            |e| format!("{name} cannot be replaced: {e}; {folder} must be writable, with room");
        let target = self.path.canonicalize().map_err(failed)?;
        // A rehearsal uses another name, so that its blanks can never be put in place.
        let suffix = before.map_or("ai-mux-try", |_| "ai-mux-new");
        let new = PathBuf::from([target.as_os_str(), suffix.as_ref()].join(".".as_ref()));
        let _ = fs::remove_file(&new); // left behind by kill -9
        // A file that is mounted by itself cannot be linked to, nor replaced (link(2), EXDEV).
        let crosses = |e: io::Error| e.kind() == ErrorKind::CrossesDevices;
        if before.is_none() && fs::hard_link(&target, &new).is_err_and(crosses) {
            return Err(format!("{name} is mounted by itself; mount its folder"));
        }
        let _ = fs::remove_file(&new);
        let put = || {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            match before {
                None => return Ok(()),
                before if stamp(&target) == before => fs::rename(&new, &target)?,
                _ => return Err(io::Error::other("another program has changed it")),
            }
            File::open(target.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        let outcome = put();
        let _ = fs::remove_file(&new); // gone already, if it was put in place
        outcome.map_err(failed)
    }

    /// Notes why a refresh or a save failed. The next try waits for the back-off, or for `least` if
    /// that is longer; with `None`, for a change of the file.
    fn fail(&self, state: &mut State, why: String, least: Option<Duration>) {
        let (name, remedy) = (self.provider.name, self.remedy());
        let Some(least) = least else {
            error!("{name}: refresh: {why}; down until its file changes or is touched; {remedy}");
            let why = format!("{why}; {remedy}");
            return state.failure = Some(Outage { why, until: None });
        };
        state.backoff = (state.backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
        let time = state.backoff.max(least).min(RETRY_AFTER_MAX);
        let (seconds, unsaved) = (time.as_secs(), state.unsaved);
        let level = if unsaved { Level::Error } else { Level::Warn };
        log!(level, "{name}: refresh: {why}; next try in {seconds}s");
        let until = Some(Instant::now() + time);
        state.failure = Some(Outage { why, until });
    }

    /// Adopts what is new on disk. `force` reads the file even if it seems unchanged. Small and
    /// local, it is read under the lock: whoever waits for that would have to read it as well.
    fn reload(&self, force: bool) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        if !force && state.settled && state.seen == stamp(&self.path) {
            return state;
        }
        state.settled = false;
        // Whether the login in memory stays in use. Once the file's is gone, it does not. Where the
        // file is one that we may not read, it does if it is unsaved, as there is no other copy.
        // Else (the file is half written, say) it does.
        let keeps = |e: &io::Error| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => false,
            ErrorKind::InvalidInput | ErrorKind::PermissionDenied => state.unsaved,
            _ => state.login.is_some(),
        };
        match self.read() {
            Ok((stamp @ (content, ctime), _, login)) => {
                // By its ctime: an mtime can be set back, or ahead.
                state.settled = ctime.elapsed().is_ok_and(|age| age > SETTLE_TIME);
                // A change of the file is worth another try, but not one of its mode.
                if state.seen.replace(stamp).map(|seen| seen.0) != Some(content) {
                    state.failure.take_if(|outage| outage.until.is_none());
                }
                self.adopt(&mut state, Ok(login));
            }
            // Not worth a word here: a refresh or a save that needs the file says what is wrong.
            Err(e) if keeps(&e) => {}
            Err(e) => self.adopt(&mut state, Err(e.to_string())),
        }
        state
    }

    /// Takes over what the file holds, a login or why there is none. Nothing changes if we have it
    /// already, or if ours is unsaved and the file still has one that was spent for it. A spent one
    /// that is put back later is not taken: ours is to be saved over it.
    fn adopt(&self, state: &mut State, found: Result<Login, String>) {
        let name = self.provider.name;
        if let (Some(last), Ok(login)) = (&state.last, &found) {
            let spent = last.spent.contains(&login.refresh);
            let ours = login.refresh == last.login.refresh;
            if state.unsaved && (spent || ours) {
                return;
            }
            if spent && !ours {
                // To spend it again would end the login.
                state.login = Some(last.login.clone());
                state.unsaved = true;
                let why = "its file holds a login again that was spent; ours goes over it".into();
                return self.fail(state, why, Some(Duration::ZERO));
            }
        }
        let found = found.map_err(|why| Outage { why, until: None });
        match &found {
            Ok(login) if !state.unsaved && state.login.as_ref() == Some(login) => return,
            Err(outage) if !state.unsaved && state.failure.as_ref() == Some(outage) => return,
            Ok(_) => info!("{name}: login read from {}", self.path.display()),
            Err(outage) => warn!("{name}: {}", outage.why),
        }
        state.take_over(found);
    }

    /// What the file holds, parsed, and the login in it. The error says why there is none for us,
    /// and what to do; by its kind, `reload` decides whether the login in memory stays in use.
    fn read(&self) -> io::Result<(Stamp, Value, Login)> {
        let failed = |e: io::Error| self.unusable(e.kind(), &format!("cannot be read: {e}"));
        let meta = fs::metadata(&self.path).map_err(failed)?;
        if meta.uid() != rustix::process::geteuid().as_raw() {
            let what = format!("is user {}'s, not ai-mux's, and may be in use", meta.uid());
            return Err(self.unusable(ErrorKind::PermissionDenied, &what));
        }
        if !meta.is_file() || meta.len() > FILE_SIZE {
            return Err(self.unusable(ErrorKind::InvalidInput, "is no regular file, or too large"));
        }
        if meta.mode() & 0o077 != 0 {
            let tried = fs::set_permissions(&self.path, Permissions::from_mode(0o600));
            let why = tried.err().map_or(String::new(), |e| format!(": {e}"));
            let mode = fs::metadata(&self.path).map_err(failed)?.mode() & 0o777;
            let name = self.path.display();
            warn!("{name}: others could read it; its mode is now {mode:o}{why}");
        }
        let before = stamp(&self.path);
        let bytes = fs::read(&self.path).map_err(failed)?;
        let unchanged = stamp(&self.path) == before;
        let json = serde_json::from_slice(&bytes).ok().filter(|_| unchanged);
        let torn = || self.unusable(ErrorKind::InvalidData, "is not whole JSON yet");
        let (stamp, json) = before.zip(json).ok_or_else(torn)?;
        let empty = || self.unusable(ErrorKind::NotFound, "holds no login");
        let login = self.provider.login_in(&json).ok_or_else(empty)?;
        Ok((stamp, json, login))
    }

    /// Why the file cannot be used, and what its owner does about it.
    fn unusable(&self, kind: ErrorKind, what: &str) -> io::Error {
        let (name, folder, mut remedy) = (self.path.display(), self.folder(), self.remedy());
        if kind == ErrorKind::PermissionDenied {
            // A dynamic user (for the range, see UIDS-GIDS.md of systemd) may see a folder as its
            // own that has another owner on disk.
            let user = rustix::process::geteuid().as_raw();
            let state_dir = self.path.ancestors().nth(2);
            let dynamic = state_dir.filter(|_| (61184..=65519).contains(&user));
            let owner = dynamic.map(|dir| format!("--reference={}", quoted(dir)));
            let owner = owner.unwrap_or(user.to_string());
            remedy += &format!(", or: chown -RH {owner} {folder} && chmod -R u+rwX {folder}");
        }
        io::Error::new(kind, format!("{name} {what}; {remedy}"))
    }

    /// The file's folder, links resolved if possible, for a shell.
    fn folder(&self) -> String {
        let path = self.path.canonicalize().unwrap_or(self.path.clone());
        quoted(path.parent().unwrap_or(&path))
    }

    /// What the owner does about a login that is missing or dead.
    fn remedy(&self) -> String {
        let folder = self.folder();
        let command = self.provider.login_command.replace("FOLDER", &folder);
        format!("log in with: mkdir -p {folder} && {command}")
    }
}

/// For a shell: in single quotes, which neither the log nor JSON escapes.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

impl State {
    /// The login, if it may be refreshed now and should be: because upstream `rejected` its access
    /// token, or because that ends within `margin`.
    fn due(&self, margin: Duration, rejected: Option<&Secret>) -> Option<&Login> {
        let login = self.login.as_ref()?;
        let too_soon = match &self.failure {
            Some(outage) => outage.until.is_none_or(|at| Instant::now() < at),
            None => self.is_young(login),
        };
        let wanted = !login.lasts(margin) || rejected == Some(&login.access);
        let due = wanted && login.refresh.is_some() && !too_soon && !CUT.load(Ordering::SeqCst);
        due.then_some(login)
    }

    /// Whether a refresh brought it less than `REFRESH_MARGIN` ago: then neither a 401, nor an
    /// expiry that is in the past by our clock, is reason for another.
    fn is_young(&self, login: &Login) -> bool {
        let young = |at: SystemTime| at.elapsed().is_ok_and(|age| age < REFRESH_MARGIN);
        matches!(&self.last, Some(last) if last.login.access == login.access && young(last.at))
    }

    /// Puts into use what the file holds, or why it holds none; what went wrong before is over.
    fn take_over(&mut self, on_disk: Result<Login, Outage>) {
        self.failure = on_disk.as_ref().err().cloned();
        self.login = on_disk.ok();
        self.unsaved = false;
        self.backoff = Duration::ZERO;
    }
}

impl Login {
    /// Whether it is still good `margin` from now, by the wall clock.
    fn lasts(&self, margin: Duration) -> bool {
        self.expires.is_none_or(|t| t > SystemTime::now() + margin)
    }
}

/// How a file looks: its device, inode, size and mtime; and its ctime, which a change of its mode
/// changes, too. While it looks the same, it has the same bytes, if it was first looked at
/// `SETTLE_TIME` after that ctime.
type Stamp = (([u64; 3], SystemTime), SystemTime);

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = fs::metadata(path).ok()?;
    let file = [meta.dev(), meta.ino(), meta.size()];
    let ctime = Duration::new(meta.ctime().max(0) as u64, meta.ctime_nsec() as u32);
    Some(((file, meta.modified().ok()?), UNIX_EPOCH + ctime))
}

/// What is used of a token endpoint's answer. Values of any kind are taken, and other fields are
/// skipped: nothing odd may cost us the new tokens, as the old one is spent by then.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct TokenAnswer {
    access_token: Value,
    refresh_token: Value,
    id_token: Value,
    expires_in: Value,
}

fn secret_in(value: &Value) -> Option<Secret> {
    Secret::new(value.as_str()?)
}

/// The error word of a token endpoint's answer (RFC 6749 section 5.2; OpenAI nests it, or calls it
/// `code`), or "" if it is nothing that looks like one.
fn error_word(json: &Value) -> &str {
    let error = &json["error"];
    let words = [&error["code"], error, &json["code"], &error["type"]];
    let usual = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    let harmless = |word: &&str| word.len() <= 64 && word.bytes().all(usual);
    let word = words.into_iter().find_map(Value::as_str);
    word.filter(harmless).unwrap_or_default()
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
fn time_in(value: &Value) -> Option<SystemTime> {
    let number = value.as_f64()?.clamp(0.0, 1e14);
    let unit = if number > 1e11 { 1000.0 } else { 1.0 };
    Some(UNIX_EPOCH + Duration::from_secs_f64(number / unit))
}

/// `Retry-After` in either form (RFC 9110 section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let date = |name| httpdate::parse_http_date(text(name)?).ok();
    let seconds = text("retry-after")?.parse().ok().map(Duration::from_secs);
    let now = date("date").unwrap_or_else(SystemTime::now); // it is theirs, whatever ours says
    seconds.or_else(|| date("retry-after")?.duration_since(now).ok())
}

// ─── upstream ────────────────────────────────────────────────────────────────────────────────
// In: a checked request and a login. Out: the upstream's answer, head read and body not. The
// header policy stands here: strip what is the client's own, set what is ours last. Most facts
// about the vendors stand here, too: their endpoints and their files.

/// What differs between the two vendors.
struct Provider {
    name: &'static str,
    base_url: &'static str,
    token_url: &'static str,
    /// What stands between `base_url` and all that comes behind `/v1/` in the client's path.
    prefix: &'static str,
    /// Added to `anthropic-beta`; `None`: `anthropic-*` is dropped, and the account is sent.
    beta: Option<&'static str>,
    /// What the token endpoint is told beside the grant's type and the refresh token.
    grant: &'static [(&'static str, &'static str)],
    /// Whether an answer with this status and error word ends a login.
    is_terminal: fn(u16, &str) -> bool,
    file: &'static str,
    /// The file's object that holds the tokens (else the file itself does), and its keys for
    /// access token, refresh token and expiry.
    object: &'static str,
    keys: [&'static str; 3],
    /// FOLDER in it stands for the file's folder.
    login_command: &'static str,
}

/// Addresses, client ids, file names and error words of the vendors' own tools, Claude Code and
/// Codex, as of November 2026.
static PROVIDERS: [Provider; 2] = [
    Provider {
        name: "claude",
        base_url: "https://api.anthropic.com",
        token_url: "https://platform.claude.com/v1/oauth/token",
        prefix: "/v1/",
        beta: Some("oauth-2025-04-20"),
        grant: &[("client_id", "9d1c250a-e61b-44d9-88ed-5944d1962f5e")],
        is_terminal: |status, _| (400..500).contains(&status) && ![408, 429].contains(&status),
        file: ".credentials.json",
        object: "claudeAiOauth",
        keys: ["accessToken", "refreshToken", "expiresAt"],
        login_command: "CLAUDE_CONFIG_DIR=FOLDER claude auth login",
    },
    Provider {
        name: "chatgpt",
        base_url: "https://chatgpt.com/backend-api/codex",
        token_url: "https://auth.openai.com/oauth/token",
        prefix: "/",
        beta: None,
        grant: &[
            ("client_id", "app_EMoamEEZ73f0CkXaXp7hrann"),
            ("scope", "openid profile email"),
        ],
        is_terminal: |status, word| {
            let spent = ["refresh_token_expired", "refresh_token_reused"].contains(&word);
            let ended = ["invalid_grant", "refresh_token_invalidated"].contains(&word);
            [400, 401].contains(&status) && (spent || ended)
        },
        file: "auth.json",
        object: "tokens",
        keys: ["access_token", "refresh_token", "expires_at"],
        login_command: "CODEX_HOME=FOLDER codex login",
    },
];

impl Provider {
    fn path(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(self.name).join(self.file)
    }

    /// The login in a parsed file; what it lacks of expiry and account, from the access token's
    /// claims. `None` without an access token.
    fn login_in(&self, json: &Value) -> Option<Login> {
        let [access, refresh, expires] = self.keys;
        let inside = json[self.object].is_object();
        let object = if inside { &json[self.object] } else { json };
        let access = secret_in(&object[access])?;
        let claims = claims(&access);
        let claimed = &claims["https://api.openai.com/auth"]["chatgpt_account_id"];
        Some(Login {
            access,
            refresh: secret_in(&object[refresh]),
            expires: time_in(&object[expires]).or_else(|| time_in(&claims["exp"])),
            account: secret_in(&object["account_id"]).or_else(|| secret_in(claimed)),
            id: secret_in(&object["id_token"]),
        })
    }

    /// Writes a login into the parsed file, into the fields that are there; all else stays.
    fn edit(&self, json: &mut Value, login: &Login) {
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
        set(access, Some(&login.access));
        set(refresh, login.refresh.as_ref());
        set("id_token", login.id.as_ref());
        if let Some(old) = object.get_mut(expires) {
            // Tools that share the file need a time: an hour, where none was told.
            let at = login.expires.unwrap_or(now + Duration::from_secs(3600));
            let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
            // The unit stays; without a time to tell it by, it is the vendor's.
            let time = old.as_f64().filter(|time| *time >= 1.0);
            let in_seconds = time.map_or(expires == "expires_at", |time| time <= 1e11);
            let millis = if in_seconds { 1000 } else { 1 };
            *old = (since_epoch.as_millis() as u64 / millis).into();
        }
    }
}

type Answer = http::Response<ureq::Body>;

struct Upstream {
    provider: &'static Provider,
    settings: ProviderSettings,
    agent: ureq::Agent,
    credential: Credential,
}

impl Upstream {
    fn new(settings: ProviderSettings, config: &Config, roots: &RootCerts) -> Result<Self, String> {
        let provider = settings.provider;
        let calls = agent_config(config, roots, &settings.token_url)?
            .timeout_global(Some(REFRESH_TIME))
            .timeout_connect(Some(REFRESH_TIME / 2)) // once for a proxy's name, once to connect
            .max_idle_connections(0);
        let requests = agent_config(config, roots, &settings.base_url)?
            .timeout_connect(Some(config.request_timeout))
            .max_idle_connections(UPSTREAMS_KEPT)
            .max_idle_connections_per_host(UPSTREAMS_KEPT);
        let connector = || DefaultConnector::new().chain(Deadline(()));
        let calls = ureq::Agent::with_parts(calls.build(), connector(), Lookup::default());
        Ok(Upstream {
            provider,
            agent: ureq::Agent::with_parts(requests.build(), connector(), Lookup::default()),
            credential: Credential {
                provider,
                path: provider.path(&config.state_dir),
                token_url: settings.token_url.clone(),
                agent: calls,
                interval: config.refresh_check_interval,
                turn: Mutex::default(),
                state: Mutex::default(),
            },
            settings,
        })
    }

    fn send(&self, url: &str, login: &Login, exchange: &mut Exchange) -> Result<Answer, Reply> {
        let request = self.outgoing(url, login, &exchange.head)?;
        WAIT_END.set(Instant::now() + exchange.timeout);
        let answer = match exchange.head.method.as_str() {
            // Without a Content-Length, ureq sends it in chunks.
            _ if exchange.head.fields.keys().any(is_framing) => {
                let body = SendBody::from_reader(exchange);
                self.agent.run(request.map(|()| body))
            }
            // A length of 0 (RFC 9110 section 8.6).
            "POST" | "PUT" | "PATCH" => self.agent.run(request.map(|()| &b""[..])),
            _ => self.agent.run(request),
        };
        answer.map_err(|e| {
            let (status, why) = match e {
                ureq::Error::Timeout(_) => (504, "did not answer within request_timeout".into()),
                e => (502, format!("cannot be reached, or broke off: {e}")),
            };
            let (at, via) = (&self.settings.base_url, via(&self.agent));
            let reply = Reply::new(status, format!("{at}{via} {why}; try again"));
            exchange.body_error.take().unwrap_or(reply)
        })
    }

    /// The header policy: the head of the request to upstream.
    fn outgoing(&self, url: &str, login: &Login, head: &Head) -> Result<http::Request<()>, Reply> {
        let method = head.method.as_str();
        let request = http::Request::builder().method(method).uri(url).body(());
        let mut request = request.map_err(|_| malformed("it cannot be passed on"))?;
        let headers = request.headers_mut();
        for (name, value) in &head.fields {
            let hop_by_hop = lists(&head.fields, "connection", name.as_str());
            if name == CONTENT_LENGTH || !hop_by_hop && !self.is_dropped(name.as_str()) {
                headers.append(name, value.clone());
            }
        }
        headers.extend(self.settings.headers.clone()); // a map's fields replace, pairs would not
        let bearer = format!("Bearer {}", login.access.expose());
        headers.insert(AUTHORIZATION, header_value(&bearer));
        if let Some(ours) = self.provider.beta {
            let mut kept = false; // ours goes up once, where it stands first
            let mut betas: Vec<_> = items(headers, "anthropic-beta").chain([ours]).collect();
            betas.retain(|b| !b.is_empty() && (*b != ours || !std::mem::replace(&mut kept, true)));
            headers.insert("anthropic-beta", header_value(&betas.join(",")));
        } else if let Some(account) = &login.account {
            headers.insert("chatgpt-account-id", header_value(account.expose()));
        }
        let mut fields = headers.iter();
        let fit = fields.all(|(name, value)| name.as_str().len() + value.len() < LINE_SIZE);
        fit.then_some(request).ok_or_else(head_too_large)
    }

    /// What is the client's own: its secrets, what holds for its connection only, and what would
    /// tell upstream about it.
    fn is_dropped(&self, name: &str) -> bool {
        is_reserved(name)
            || matches!(name, "forwarded" | "x-real-ip")
            || name.starts_with("x-forwarded-")
            || self.provider.beta.is_none() && name.starts_with("anthropic-")
    }
}

/// Text that is known to fit a header.
fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("a Secret, or joined from headers")
}

/// Headers that no configuration may set, and no client pass on (but for its content-length):
/// authentication, cookies, account, framing, `host`, `expect`, hop-by-hop.
fn is_reserved(name: &str) -> bool {
    is_hop_by_hop(name)
        || matches!(name, "x-api-key" | "cookie" | "chatgpt-account-id")
        || matches!(name, "authorization" | "host" | "expect" | "content-length")
}

fn is_framing(name: &HeaderName) -> bool {
    name == CONTENT_LENGTH || name == TRANSFER_ENCODING
}

/// RFC 9110 section 7.6.1; `trailer`, as we drop trailers; and what proxies say to each other.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(name, "connection" | "keep-alive" | "te" | "trailer")
        || matches!(name, "transfer-encoding" | "upgrade")
        || name.starts_with("proxy-")
}

// ─── upstream: the connection ────────────────────────────────────────────────────────────────
// In: a URL, and a time to wait. Out: an open connection, which ureq makes and keeps. What ureq is
// told stands here, and what it lacks: a proxy for some hosts, known addresses, deadlines.

/// What vouches for an upstream: the built-in roots, or those in `SSL_CERT_FILE`.
fn roots() -> Result<RootCerts, String> {
    let file = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty());
    let Some(path) = file else {
        return Ok(RootCerts::WebPki);
    };
    let trusted = certificates(path.as_ref()).map_err(|e| format!("SSL_CERT_FILE: {e}"))?;
    let owned = |der: &CertificateDer| ureq::tls::Certificate::from_der(der).to_owned();
    Ok(trusted.iter().map(owned).into())
}

/// How upstream is reached, for requests and refreshes: no redirect, no header of ureq's own.
fn agent_config(config: &Config, roots: &RootCerts, url: &str) -> Result<AgentConfig, String> {
    let uri: http::Uri = url.parse().map_err(|e| format!("{url}: {e}"))?;
    let tls = ureq::tls::TlsConfig::builder().root_certs(roots.clone());
    Ok(ureq::Agent::config_builder()
        .tls_config(tls.build())
        .proxy(proxy_for(&uri, config)?.filter(|_| !is_loopback(&uri)))
        .http_status_as_error(false)
        .max_redirects(0)
        .accept("")
        .user_agent("")
        .allow_non_standard_methods(true)
        .input_buffer_size(UPSTREAM_INPUT)
        .output_buffer_size(UPSTREAM_OUTPUT)
        .max_response_header_size(UPSTREAM_INPUT) // after a 1xx, ureq measures its whole buffer
        .max_idle_age(UPSTREAM_IDLE))
}

type AgentConfig = ureq::config::ConfigBuilder<ureq::typestate::AgentScope>;

/// The configured proxy, else the environment's: HTTPS_PROXY, ALL_PROXY, but not for NO_PROXY.
/// ureq's own reading prefers ALL_PROXY, and takes a listed name without what is below it.
fn proxy_for(uri: &http::Uri, config: &Config) -> Result<Option<ureq::Proxy>, String> {
    let set = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let mut names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].into_iter();
    let found = names.find_map(|name| Some((name, set(name)?)));
    let Some((name, text)) = found.filter(|_| config.proxy.is_none()) else {
        return Ok(config.proxy.clone());
    };
    let no_url = |_| format!("{name} (not shown): expected a proxy's URL");
    let proxy = ureq::Proxy::new(&text).map_err(no_url)?;
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    // A name stands for all that is below it, with or without a dot before it.
    let listed = |item: &str| {
        let name = item.trim().trim_start_matches(['*', '.']);
        let front = host.strip_suffix(name).filter(|_| !name.is_empty());
        item.trim() == "*" || front.is_some_and(|f| f.is_empty() || f.ends_with('.'))
    };
    let no_proxy = set("NO_PROXY").or(set("no_proxy")).unwrap_or_default();
    let direct = no_proxy.to_ascii_lowercase().split(',').any(listed);
    Ok((!direct).then_some(proxy))
}

/// A word for an agent's errors, which may be the proxy's.
fn via(agent: &ureq::Agent) -> &'static str {
    let proxy = agent.config().proxy();
    proxy.map_or("", |_| " (through the proxy)")
}

/// The certificates in a PEM file, one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let failed = |why: &dyn Display| format!("{}: {why}", path.display());
    let pem = fs::read(path).map_err(|e| failed(&e))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    chain.ok_or_else(|| failed(&"found no certificate, expected PEM"))
}

fn is_loopback(uri: &http::Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// Looks a name up for ureq, which asks before each request, even for a kept connection. What was
/// found is good for `LOOKUP_AGE`, and for longer while new look-ups fail or take too long.
#[derive(Debug, Default)]
struct Lookup(Mutex<BTreeMap<String, (Instant, ResolvedSocketAddrs)>>);

type Found = Result<ResolvedSocketAddrs, ureq::Error>;

impl Resolver for Lookup {
    fn resolve(&self, uri: &http::Uri, config: &ureq::config::Config, time: NextTimeout) -> Found {
        let name = format!("{:?} {:?}", uri.scheme(), uri.authority());
        let known = lock(&self.0).get(&name).cloned();
        let mut time = in_time(time);
        match &known {
            Some((until, addresses)) if Instant::now() < *until => return Ok(addresses.clone()),
            Some(_) => time.after = time.after.min(LOOKUP_TIME.into()),
            None => {}
        }
        // ureq's own has a thread look it up, and panics, as the log then says, where it gets none.
        let look_up = || DefaultResolver::default().resolve(uri, config, time);
        let no_thread = |_| Err(io::Error::other("no thread for a look-up").into());
        let found = catch_unwind(AssertUnwindSafe(look_up)).unwrap_or_else(no_thread);
        let mut addresses = found.or_else(|e| known.map(|(_, old)| old).ok_or(e))?;
        addresses.sort_by_key(SocketAddr::is_ipv6); // IPv6 last: where broken, it costs a time-out
        lock(&self.0).insert(name, (Instant::now() + LOOKUP_AGE, addresses.clone()));
        Ok(addresses)
    }
}

thread_local! {
    /// Until when this thread waits for upstream to take or to send what is next. Set anew for each
    /// step, by `request_token`, `send`, the body's reader and `relay`: ureq passes nothing down.
    static WAIT_END: Cell<Instant> = Cell::new(Instant::now());
}

/// A ureq transport that waits until `WAIT_END` at most (for a write that the kernel takes in part,
/// as long again), and is open only if nothing is left to read; `Deadline<()>` wraps any other in
/// one. ureq's own limits would not do: they start anew with each phase of a request, and the one
/// for a single read is for heads and handshakes, too.
#[derive(Debug)]
struct Deadline<T>(T);

type Made<T> = Result<Option<Deadline<T>>, ureq::Error>;

impl<T: Transport> Connector<T> for Deadline<()> {
    type Out = Deadline<T>;

    fn connect(&self, _: &ConnectionDetails, made: Option<T>) -> Made<T> {
        Ok(made.map(Deadline))
    }
}

/// The lesser of `time` and what is left until `WAIT_END`. `time` can be less: connecting has
/// limits of its own, and behind an HTTP proxy an outer `Deadline` asks in `is_open` for no wait.
fn in_time(mut time: NextTimeout) -> NextTimeout {
    // Rounded up to 0.1 s, it mostly equals the one before: plain HTTP then saves a setsockopt(2).
    let left = left_until(WAIT_END.get()).as_micros();
    let left = Duration::from_micros(left.next_multiple_of(100_000) as u64);
    time.after = time.after.min(left.into());
    time
}

impl<T: Transport> Transport for Deadline<T> {
    fn await_input(&mut self, time: NextTimeout) -> Result<bool, ureq::Error> {
        // By its kind, ureq would take a reset, and TLS without its close_notify, for the end of an
        // answer without a size (RFC 9112 section 9.8).
        let came = self.0.await_input(in_time(time));
        came.map_err(|e| match e {
            ureq::Error::Io(e) => io::Error::other(e).into(),
            e => e,
        })
    }

    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, time: NextTimeout) -> Result<(), ureq::Error> {
        self.0.transmit_output(amount, in_time(time))?;
        // ureq's TLS says nothing of a time-out, and would send again what went out in part.
        let late = left_until(WAIT_END.get()).is_zero();
        let timeout = Err(ureq::Error::Timeout(time.reason));
        if late { timeout } else { Ok(()) }
    }

    fn is_open(&mut self) -> bool {
        // TLS may hold input or its end already. The error is the time-out: nothing has come.
        let time = NextTimeout {
            after: Duration::ZERO.into(),
            ..NextTimeout::default()
        };
        self.0.is_open() && self.0.await_input(time).is_err()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}

// ─── stream ──────────────────────────────────────────────────────────────────────────────────
// In: a client's bytes. Out: heads, decoded bodies; and to the client, answers, piece by piece.
// One rule bounds all of it: a socket knows an instant until which the present step must be done.

struct Socket {
    /// Never blocks by itself.
    tcp: TcpStream,
    /// When the present step must be done: a read, a write, or a wait in the gate or its queue.
    deadline: Instant,
    /// Whether a step waits until then, as with a worker, or is `WouldBlock`, as in the gate.
    blocking: bool,
}

impl Socket {
    /// One read or write, tried until it does not block, or until the deadline.
    fn step<T>(&self, flags: PollFlags, mut go: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            let left = left_until(self.deadline);
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            match go() {
                Err(e) if e.kind() == ErrorKind::WouldBlock && self.blocking => {
                    let mut source = [PollFd::new(&self.tcp, flags)];
                    let _ = poll(&mut source, left.min(RETRY_TIME).try_into().ok().as_ref());
                }
                outcome => return outcome,
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.step(PollFlags::IN, || (&self.tcp).read(out))
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.step(PollFlags::OUT, || (&self.tcp).write(bytes))
    }

    /// Takes all records at once: after an error, rustls writes only once, and its alert is the
    /// last of them.
    fn write_vectored(&mut self, records: &[IoSlice]) -> io::Result<usize> {
        self.step(PollFlags::OUT, || (&self.tcp).write_vectored(records))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Stream {
    socket: Socket,
    peer: SocketAddr,
    tls: Option<Box<rustls::ServerConnection>>,
    /// Read from the client but not used yet: it travels with the stream.
    buffered: VecDeque<u8>,
    /// TLS bytes have come that gave no data yet: a part of a record, mostly.
    partial: bool,
    /// The gate must read it: its socket is readable, or data may be buffered above that.
    must_read: bool,
    /// After its last answer: what still comes is dropped.
    draining: bool,
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.buffered.is_empty() {
            self.fill()?;
        }
        self.buffered.read(out)
    }
}

impl Stream {
    fn new(tcp: TcpStream, peer: SocketAddr, tls: Option<rustls::ServerConnection>) -> Stream {
        let stream = Stream {
            socket: Socket {
                tcp,
                deadline: Instant::now(),
                blocking: false,
            },
            peer,
            tls: tls.map(Box::new),
            buffered: VecDeque::new(),
            partial: false,
            must_read: false,
            draining: false,
        };
        stream.enter_gate()
    }

    /// The stream as it is in the gate: between two heads, or after its last answer.
    fn enter_gate(mut self) -> Stream {
        self.buffered.shrink_to_fit(); // an idle connection holds no buffer
        self.socket.blocking = false;
        self.socket.deadline = Instant::now() + self.allowance();
        // poll(2) does not tell of what was read already.
        self.must_read = self.tls.is_some() || !self.buffered.is_empty();
        self
    }

    /// How long it may stay in the gate as it is: draining, in a handshake or a head, or idle.
    fn allowance(&self) -> Duration {
        if self.draining {
            return LINGER_TIME;
        }
        let begun = self.partial || !self.buffered.is_empty() || self.is_handshaking();
        if begun { HEAD_TIME } else { IDLE_TIME }
    }

    fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// When the gate looks at it even if its socket is silent.
    fn due_at(&self) -> Instant {
        let now = self.must_read.then(Instant::now);
        now.unwrap_or(self.socket.deadline)
    }

    /// Reads on in the gate, twice at most, for the others' sake: the next head, once it is whole.
    fn next_head(&mut self) -> Result<Option<Head>, Reply> {
        self.must_read = false;
        for _ in 0..2 {
            // Each phase, of a handshake, a head, or between two, has a time of its own.
            let phase = (self.is_handshaking(), self.allowance());
            if self.draining {
                self.buffered.clear();
            } else if let Some(head) = Head::take(&mut self.buffered)? {
                return Ok(Some(head));
            }
            let read = self.fill();
            if (self.is_handshaking(), self.allowance()) != phase {
                self.socket.deadline = Instant::now() + self.allowance();
            }
            match read {
                Ok(1..) => {}
                Ok(0) => return Err(broken("the client ended it")),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::TimedOut && !self.buffered.is_empty() => {
                    return Err(Reply::new(408, "the head came too slowly; send it at once"));
                }
                Err(e) => return Err(broken(e.to_string())),
            }
        }
        self.must_read = true;
        Ok(None)
    }

    /// Reads some more onto the end of `buffered`: how much, 0 at the client's end.
    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; READ_SIZE];
        let count = loop {
            let Some(tls) = &mut self.tls else {
                break self.socket.read(&mut chunk)?;
            };
            // Not rustls::Stream: it reads on for as long as records without data come.
            let shaking = tls.is_handshaking();
            let (came, _) = tls.complete_io(&mut self.socket)?;
            let read = tls.reader().read(&mut chunk);
            let empty = matches!(&read, Err(e) if e.kind() == ErrorKind::WouldBlock);
            self.partial = empty && (self.partial || came > 0 && !shaking);
            if !empty || !self.socket.blocking {
                break read?;
            }
        };
        self.buffered.extend(&chunk[..count]);
        Ok(count)
    }

    /// Writes all of it, within `PIECE_TIME`.
    fn write_piece(&mut self, piece: &[u8]) -> io::Result<()> {
        self.socket.deadline = Instant::now() + PIECE_TIME;
        let Some(tls) = &mut self.tls else {
            return self.socket.write_all(piece);
        };
        let mut tls = rustls::Stream::new(&mut **tls, &mut self.socket);
        tls.write_all(piece)?;
        tls.flush() // tells what the write does not: whether all of it has gone out
    }

    /// Says that nothing more will be sent. What still comes is drained: a client that is sending
    /// would see a reset, and not the answer, were it closed at once (RFC 9112 section 9.6).
    fn half_close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut self.socket).is_ok() {}
        }
        let _ = self.socket.tcp.shutdown(Shutdown::Write);
        self.draining = true;
        self.socket.deadline = Instant::now() + self.allowance();
    }
}

/// A stream that the gate drops had no answer cut off, and TLS says so (RFC 9112 section 9.8); one
/// that a worker drops must be seen to be broken. A second panic would end the process.
impl Drop for Stream {
    fn drop(&mut self) {
        if !self.socket.blocking && !thread::panicking() {
            self.socket.deadline = Instant::now() + PIECE_TIME; // it may be over
            self.half_close();
        }
    }
}

impl Exchange {
    /// Reads a small body into memory whole. Of a large one, nothing is read if its size is known,
    /// else its first `HELD_SIZE`, and a byte.
    fn hold(&mut self) -> Result<(), Reply> {
        if self.head.body.left > HELD_SIZE {
            return Ok(());
        }
        let mut held = Vec::with_capacity(self.head.body.left as usize);
        let most = HELD_SIZE + 1; // the end of a body in chunks stands behind its last byte
        let _ = self.by_ref().take(most).read_to_end(&mut held); // sets `body_error`
        self.held = Cursor::new(held);
        self.body_error.take().map_or(Ok(()), Err)
    }

    fn read_body(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.head.expect) && !self.head.body.is_done() {
            self.stream.write_piece(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let began = Instant::now();
        self.stream.socket.deadline = began + self.patience.min(PIECE_TIME);
        let count = self.head.body.read(&mut self.stream, out)?;
        let earned = Duration::from_secs(count as u64) / BODY_RATE;
        self.patience = (self.patience + earned).saturating_sub(began.elapsed());
        Ok(count)
    }
}

/// The body, decoded: what is held of it first. Every error leaves a `body_error`.
impl Read for Exchange {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let open = !self.head.body.is_done();
        let read = match self.held.read(out)? {
            0 => self.read_body(out),
            count => Ok(count),
        };
        if open {
            WAIT_END.set(Instant::now() + self.timeout); // it counts from the body's end
        }
        let error = match read {
            Ok(_) if self.head.body.received > BODY_SIZE => body_too_large(),
            Ok(count) => return Ok(count),
            Err(e) => match e.kind() {
                ErrorKind::TimedOut => Reply::new(408, "the body came too slowly; send it faster"),
                ErrorKind::UnexpectedEof => malformed("the body ended early; send all of it"),
                ErrorKind::InvalidData => malformed(&e.to_string()),
                _ => broken("the client went away while it sent the body"),
            },
        };
        self.body_error = Some(error);
        Err(io::Error::other("the request body broke off"))
    }
}

/// Takes a body out of a stream by its framing: one of a known size is one chunk. Chunks are
/// read strictly (RFC 9112 section 7.1), trailers dropped; what is wrong is `InvalidData`.
#[derive(Default)]
struct Body {
    /// Of the present chunk, and whether another one comes behind it.
    left: u64,
    chunked: bool,
    /// How much of it came.
    received: u64,
}

impl Body {
    /// One length, or one coding: with two, another reader could go by the other one (RFC 9112
    /// section 6.3).
    fn of(fields: &HeaderMap) -> Result<Body, &'static str> {
        let framing = fields.iter().filter(|(name, _)| is_framing(name));
        let framing: Vec<_> = framing.map(|(_, v)| v.to_str().unwrap_or("")).collect();
        let sized = fields.contains_key(CONTENT_LENGTH);
        let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let mut body = Body::default();
        match framing[..] {
            [] => {}
            [n] if sized && number(n) => body.left = n.parse().unwrap_or(u64::MAX),
            [coding] if !sized && coding.eq_ignore_ascii_case("chunked") => body.chunked = true,
            _ => return Err("the body must have one Content-Length, a number, or be chunked"),
        }
        Ok(body)
    }

    fn is_done(&self) -> bool {
        self.left == 0 && !self.chunked
    }

    fn read(&mut self, source: &mut impl Read, out: &mut [u8]) -> io::Result<usize> {
        if self.chunked && self.left == 0 {
            self.next_chunk(source)?;
        }
        let count = source.take(self.left).read(out)?;
        if count == 0 && self.left > 0 && !out.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        self.received += count as u64;
        Ok(count)
    }

    /// Reads a chunk's size and, after the last one, the trailers.
    fn next_chunk(&mut self, source: &mut impl Read) -> io::Result<()> {
        // The line end behind the data of the chunk before.
        if self.received > 0 && !chunk_line(source)?.is_empty() {
            return Err(invalid("a chunk is longer than its size"));
        }
        let line = chunk_line(source)?;
        let size = line.split(';').next().unwrap_or_default();
        let signed = size.starts_with('+'); // which Rust's parser would take
        let size = u64::from_str_radix(size, 16).ok().filter(|_| !signed);
        self.left = size.ok_or_else(|| invalid("a chunk's size is not a number"))?;
        for _ in 0..=FIELD_COUNT {
            if self.left > 0 || chunk_line(source)?.is_empty() {
                self.chunked = self.left > 0; // not before: what is broken never counts as read
                return Ok(());
            }
        }
        Err(invalid("there are too many trailers"))
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

fn chunk_line(source: &mut impl Read) -> io::Result<String> {
    let (source, mut line) = (source.take(LINE_SIZE as u64), String::new());
    // By the byte: what follows is not the line's.
    io::BufReader::with_capacity(1, source).read_line(&mut line)?;
    let printable = |text: &&str| text.bytes().all(|b| matches!(b, b'\t' | b' '..=b'~'));
    let text = line.strip_suffix("\r\n").filter(printable);
    let not_a_line = || invalid("a line between chunks is cut off, too long, or not plain");
    text.map(str::to_owned).ok_or_else(not_a_line)
}

/// Passes the answer down as it comes: each piece is written at once.
fn relay(answer: Answer, exchange: &mut Exchange, proxy: &Proxy) -> Outcome {
    let gone = |e| broken(format!("the client went away, or took nothing: {e}"));
    let broke = |e| match ureq::Error::from(e) {
        ureq::Error::Timeout(_) => broken("upstream was silent for stream_idle_timeout"),
        e => broken(format!("upstream broke off: {e}")),
    };
    let (parts, body) = answer.into_parts();
    let peer = exchange.stream.peer;
    let users = &proxy.config.users; // a client's token may come back
    debug!("peer={peer} answer: {}", shown(&parts.headers, users));
    if parts.status.is_informational() {
        return Err(Reply::new(502, "upstream answered 101 unasked; try again"));
    }
    exchange.report.status = parts.status.as_u16();
    let header = |name| parts.headers.get(name);
    let request_id = header("request-id").or(header("x-request-id")).cloned();
    exchange.report.request_id = request_id.filter(|id| !has_token(id.as_bytes(), users));
    let (head, chunked) = answer_head(&parts, &exchange.head);
    exchange.stream.write_piece(&head).map_err(gone)?;
    exchange.report.first = Some(exchange.started.elapsed());
    let mut piece = vec![0; 2048]; // enough for most events; a large answer makes it grow
    let mut reader = body.into_reader();
    loop {
        WAIT_END.set(Instant::now() + proxy.config.stream_idle_timeout);
        let count = reader.read(&mut piece).map_err(broke)?;
        if CUT.load(Ordering::SeqCst) {
            return Err(broken("a stop")); // `serve_next` says it in words
        }
        let size = format!("{count:x}\r\n");
        let framed: &[u8] = match chunked {
            true => &[size.as_bytes(), &piece[..count], b"\r\n"].concat(), // it is one write
            false => &piece[..count],
        };
        exchange.stream.write_piece(framed).map_err(gone)?;
        exchange.report.bytes += count as u64;
        if count == piece.len() {
            piece.resize(PIECE_SIZE, 0);
        }
        if count == 0 {
            return Ok(()); // and the chunk of no bytes was the last
        }
    }
}

/// The answer's head, framed anew; and whether its body goes in chunks. HTTP/1.0 has none: there
/// a body without a size ends with the connection, which is never kept alive.
fn answer_head(parts: &Parts, request: &Head) -> (Vec<u8>, bool) {
    let (headers, status) = (&parts.headers, parts.status);
    let bodyless = request.method == "HEAD" || matches!(status.as_u16(), 204 | 304);
    // A length that is told in two ways is none, and a 204 has none (RFC 9110 section 8.6).
    let sized = headers.contains_key(CONTENT_LENGTH) && Body::of(headers).is_ok() && status != 204;
    let chunked = !sized && !bodyless && !request.http10;
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    for (name, value) in headers {
        // Proxy-Status is end-to-end (RFC 9209), unlike the other proxy- fields.
        let dropped = is_hop_by_hop(name.as_str()) && name != "proxy-status"
            || matches!(name.as_str(), "set-cookie" | "alt-svc")
            || name == CONTENT_LENGTH && !sized
            || name != CONTENT_LENGTH && lists(headers, "connection", name.as_str());
        if !dropped {
            head.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
    }
    if chunked {
        head.extend(b"transfer-encoding: chunked\r\n");
    }
    if !request.keep_alive {
        head.extend(b"connection: close\r\n");
    }
    head.extend(b"\r\n");
    (head, chunked)
}

// ─── config ──────────────────────────────────────────────────────────────────────────────────
// In: the configuration file, and which logins there are. Out: a `Config` that cannot be wrong, or
// one line that names the file, the field, what was found and what would be right; what was found
// is not shown where it could be a secret.

struct Config {
    /// Host (an IPv6 address in brackets) and port.
    listen: (String, u16),
    state_dir: PathBuf,
    log_level: LevelFilter,
    providers: Vec<ProviderSettings>,
    users: Vec<User>,
    request_timeout: Duration,
    stream_idle_timeout: Duration,
    refresh_check_interval: Duration,
    workers: u64,
    proxy: Option<ureq::Proxy>,
    tls: Option<Tls>,
}

struct ProviderSettings {
    provider: &'static Provider,
    headers: HeaderMap,
    base_url: String,
    token_url: String,
}

struct User {
    name: String,
    token: Secret,
}

fn load_config(path: &Path) -> Result<Config, String> {
    let read = || -> Result<Config, String> {
        let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
        let text = text.trim_start_matches('\u{feff}');
        if path.extension().is_some_and(|end| end == "json") {
            return parse_config(serde_json::from_str(text).map_err(unquoted)?);
        }
        let config = parse_config(serde_yaml::from_str(text).map_err(unquoted)?)?;
        // Refuses tags, as JSON's values have none: `!secret x`, say, does not mean x itself. Only
        // now: the error names a field, and one that is not yet known as ours could be a secret.
        let tagged = |e: serde_yaml::Error| e.to_string().replace("type: enum", "type: a tag");
        serde_yaml::from_str::<Value>(text).map_err(tagged)?;
        Ok(config)
    };
    read().map_err(|e| format!("{}: {e}", path.display()).replace(char::is_control, " "))
}

fn parse_config(file: Yaml) -> Result<Config, String> {
    let known = "listen state_dir log_level providers users request_timeout \
        stream_idle_timeout refresh_check_interval workers proxy tls";
    let file = &mut fields(file, known)?;
    let state_dir = field("state_dir", file, "~/.ai-mux", PATH)?;
    // Absolute, as messages tell it to people in other folders.
    let state_dir = std::path::absolute(state_dir).map_err(|e| format!("state_dir: {e}"))?;
    let mut entries = field("providers", file, Vec::<Yaml>::new(), LIST)?;
    if entries.is_empty() {
        // One that cannot be looked at is there: it answers 503 and says why.
        let there = |p: &&Provider| !matches!(p.path(&state_dir).try_exists(), Ok(false));
        entries.extend(PROVIDERS.iter().filter(there).map(|p| p.name.into()));
    }
    let providers: Result<Vec<_>, _> = entries.into_iter().map(provider).collect();
    let providers = providers.map_err(|e| format!("providers: {e}"))?;
    let count = |name| providers.iter().filter(|p| p.provider.name == name).count();
    if let Some(Provider { name, .. }) = PROVIDERS.iter().find(|p| count(p.name) > 1) {
        return Err(format!("providers: found {name} twice, expected each once"));
    }
    let entries = field("users", file, Vec::<Yaml>::new(), LIST)?;
    let users: Result<Vec<_>, _> = entries.into_iter().map(user).collect();
    let users = users.map_err(|e| format!("users: {e}"))?;
    let same = |a: &User, b: &User| a.name == b.name || a.token == b.token;
    let twice = |a: &&User| users.iter().filter(|b| same(a, b)).count() > 1;
    if let Some(User { name, .. }) = users.iter().find(twice) {
        return Err(format!("users: {name:?} or its token twice, expected once"));
    }
    Ok(Config {
        listen: field("listen", file, ":8080", ADDRESS)?,
        state_dir,
        log_level: field("log_level", file, "info", LEVEL)?,
        providers,
        users,
        request_timeout: field("request_timeout", file, "60s", DURATION)?,
        stream_idle_timeout: field("stream_idle_timeout", file, "5m", DURATION)?,
        refresh_check_interval: field("refresh_check_interval", file, "10m", INTERVAL)?,
        workers: field("workers", file, 64, WORKERS)?,
        proxy: field("proxy", file, "", PROXY)?,
        tls: tls(field("tls", file, Mapping::new(), MAP)?).map_err(|e| format!("tls.{e}"))?,
    })
}

/// A provider may be just its name.
fn provider(mut entry: Yaml) -> Result<ProviderSettings, String> {
    if !entry.is_mapping() {
        entry = Mapping::from_iter([("name".into(), entry)]).into();
    }
    let entry = &mut fields(entry, "name headers base_url token_url")?;
    let provider = field("name", entry, "", PROVIDER)?;
    Ok(ProviderSettings {
        provider,
        headers: headers(field("headers", entry, Mapping::new(), MAP)?)?,
        base_url: field("base_url", entry, provider.base_url, URL)?,
        token_url: field("token_url", entry, provider.token_url, URL)?,
    })
}

fn user(entry: Yaml) -> Result<User, String> {
    let entry = &mut fields(entry, "name token token_file")?;
    let name = field("name", entry, "", NAME)?;
    let mut place = format!("{name:?}");
    if entry.contains_key("token_file") {
        let path = field("token_file", entry, "", PATH)?;
        let shown = path.to_str().filter(|path| path.starts_with(['/', '.']));
        let shown = shown.unwrap_or("(not shown, as it may be the token)");
        place += &format!(": token_file {shown}");
        let text = fs::read_to_string(&path).map_err(|e| format!("{place}: {e}"))?;
        if entry.insert("token".into(), text.trim().into()).is_some() {
            return Err(format!("{name:?}: expected token or token_file, not both"));
        }
    }
    let token = field("token", entry, "", TOKEN).map_err(|e| format!("{place}: {e}"))?;
    Ok(User { name, token })
}

fn headers(entries: Mapping) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in &entries {
        let name = name.as_str().unwrap_or_default();
        let key = HeaderName::try_from(name).ok();
        let key = key.filter(|key| !is_reserved(key.as_str()) && !headers.contains_key(key));
        let value = value.as_str().and_then(|v| HeaderValue::from_str(v).ok());
        let value = value.filter(|v| v.to_str().is_ok() && name.len() + v.len() < LINE_SIZE);
        let Some((key, value)) = key.zip(value).filter(|_| headers.len() < FIELD_COUNT) else {
            let name_end = |c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c);
            let name = name.split(name_end).next().unwrap_or_default(); // a value could follow
            let expected = "a header that may be set: once, quoted, ASCII, below 8 KiB, 100 in all";
            return Err(format!("headers: {name:?} is not {expected}"));
        };
        headers.insert(key, value);
    }
    Ok(headers)
}

fn tls(entry: Mapping) -> Result<Option<Tls>, String> {
    let entry = &mut fields(entry.into(), "enabled cert_path key_path")?;
    let enabled = field("enabled", entry, false, BOOL)?;
    let or = if enabled { Yaml::Null } else { "".into() }; // null is no path
    let [cert, key] = ["cert_path", "key_path"].map(|name| field(name, entry, or.clone(), PATH));
    let files = [cert?, key?];
    enabled.then(|| Tls::open(files)).transpose()
}

/// Why the file cannot be parsed. Of what is in it, only the name of the outermost field is shown,
/// and what looks like a repeated field's name: any other key or value could be a secret.
fn unquoted(e: impl Display) -> String {
    let text = e.to_string();
    let kinds = ["duplicate entry", "invalid type", "invalid value"].into_iter();
    let Some(at) = kinds.filter_map(|kind| text.find(kind)).min() else {
        return text; // about the syntax, quoting nothing
    };
    let (path, why) = text.split_at(at);
    let field = path.split(['.', '[', ':']).next().unwrap_or_default();
    let twice = why.starts_with("duplicate");
    let in_names = |b: u8| b == b'_' || b.is_ascii_lowercase();
    let is_name = |key: &str| key.len() < USER_TOKEN_LENGTH && key.bytes().all(in_names);
    let why = match why.split(['"', '`']).collect::<Vec<_>>()[..] {
        [front, quoted, ..] if !(twice && is_name(quoted)) => format!("{front}(not shown)"),
        [_] if why.contains("key ") => "duplicate entry (not shown)".into(), // a number
        _ => why.to_owned(),
    };
    let line = format!("{field}: {why}");
    line.trim_start_matches(": ").to_owned()
}

/// The fields of a part of the file, none unknown, or tagged (a `str` equals a tagged value, too);
/// one that is null counts as absent.
fn fields(part: Yaml, known: &str) -> Result<Mapping, String> {
    let not_a_map = |_| "found something (not shown), expected NAME: VALUE lines";
    let mut fields: Mapping = serde_yaml::from_value(part).map_err(not_a_map)?;
    let unknown = |key: &&Yaml| !known.split(' ').map(Yaml::from).any(|name| name == **key);
    let Some(key) = fields.keys().find(unknown) else {
        fields.retain(|_, value| !value.is_null());
        return Ok(fields);
    };
    // A user's key could be a token, with no space after its colon, or no NAME: before it.
    let key = key.as_str().and_then(|key| key.split(':').next());
    let short = key.filter(|key| key.len() < USER_TOKEN_LENGTH || !known.contains("token_file"));
    let key = short.unwrap_or("a field (not shown)");
    Err(format!("{key}: unknown, expected one of: {known}"))
}

/// The checked value of a field, or of its default.
fn field<T>(name: &str, of: &mut Mapping, or: impl Into<Yaml>, kind: Kind<T>) -> Result<T, String> {
    let (expected, parse) = kind;
    let value = of.remove(name).unwrap_or_else(|| or.into());
    let text = serde_json::to_string(&value).unwrap_or_default();
    // In a URL: a password, a query, a fragment. Elsewhere: a key in PEM, or lines of one.
    let marks = ["@", "?", "#", "-----", "\\n"];
    let secret = ["token", "token_file", "users", "headers", "proxy"].contains(&name);
    let secret = secret || marks.iter().any(|mark| text.contains(mark));
    let shown = match &value {
        Yaml::Mapping(_) | Yaml::Sequence(_) | Yaml::Tagged(_) => "a nested value",
        _ if secret && text != "\"\"" => "something (not shown)",
        _ => &text,
    };
    parse(&value).ok_or_else(|| format!("{name}: found {shown}, expected {expected}"))
}

/// What a field may be, in words; and its parser, `None` for anything else.
type Kind<T> = (&'static str, fn(&Yaml) -> Option<T>);

const BOOL: Kind<bool> = ("true or false", Yaml::as_bool);

const LIST: Kind<Vec<Yaml>> = ("a list", |value| value.as_sequence().cloned());

const MAP: Kind<Mapping> = ("NAME: VALUE lines", |value| value.as_mapping().cloned());

const PATH: Kind<PathBuf> = ("a path, or ~/PATH where there is a home", |value| {
    let no_pasted_key = |path: &&str| !path.contains("-----") && !path.contains('\n');
    let path = value.as_str().filter(no_pasted_key)?;
    match Path::new(path).strip_prefix("~") {
        Ok(rest) => Some(std::env::home_dir()?.join(rest)),
        Err(_) if path.starts_with('~') => None, // nobody else's home
        Err(_) => Some(path.into()),
    }
});

const ADDRESS: Kind<(String, u16)> = ("\":PORT\", \"HOST:PORT\" or \"[IPV6]:PORT\"", |value| {
    let (host, port) = value.as_str()?.rsplit_once(':')?;
    let host = if host.is_empty() { "[::]" } else { host };
    let ip = host.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
    let (name, marks) = ip.map_or((host, "-._"), |ip| (ip, "-._:%"));
    let in_hosts = |c: char| c.is_ascii_alphanumeric() || marks.contains(c);
    let valid = !name.is_empty() && name.chars().all(in_hosts) && !port.starts_with('+');
    valid.then_some((host.to_owned(), port.parse().ok()?))
});

const LEVEL: Kind<LevelFilter> = ("debug, info, warn or error", |value| {
    let level = value.as_str()?.parse().ok(); // in capitals, too
    level.filter(|level| (LevelFilter::Error..=LevelFilter::Debug).contains(level))
});

const DURATION: Kind<Duration> = ("60s, 1h30m or the like, or unquoted seconds", |value| {
    let seconds = value.as_u64().map(Duration::from_secs);
    // humantime also knows longer words, and days and up: only h, m, s, ms, us and ns pass; and no
    // long text, as it panics on some.
    let short = |c: char| c.is_ascii_digit() || ". hmsun".contains(c);
    let safe = |text: &&str| text.len() <= 20 && text.chars().all(short);
    let text = value.as_str().filter(safe);
    let time = seconds.or_else(|| humantime::parse_duration(text?).ok())?;
    Some(time).filter(|time| !time.is_zero() && *time <= DURATION_MAX)
});

const INTERVAL: Kind<Duration> = ("a duration of at least 1s", |value| {
    (DURATION.1)(value).filter(|time| *time >= Duration::from_secs(1))
});

const WORKERS: Kind<u64> = ("a number from 1 to 65535", |value| {
    value.as_u64().filter(|count| (1..=65535).contains(count))
});

const PROXY: Kind<Option<ureq::Proxy>> = ("http://HOST:PORT or socks5://HOST:PORT", |value| {
    let text = value.as_str()?;
    let proxy = whole_uri(text).and(ureq::Proxy::new(text).ok());
    (text.is_empty() || proxy.is_some()).then_some(proxy)
});

const PROVIDER: Kind<&Provider> = ("claude or chatgpt", |value| {
    PROVIDERS.iter().find(|p| Some(p.name) == value.as_str())
});

const NAME: Kind<String> = ("a name, but not -, without control characters", |value| {
    let valid = |name: &&str| !["", "-"].contains(name) && !name.contains(char::is_control);
    value.as_str().filter(valid).map(str::to_owned)
});

const TOKEN: Kind<Secret> = ("a text of 16+ visible ASCII, or a token_file", |value| {
    let valid = |text: &&str| text.len() >= USER_TOKEN_LENGTH && !text.contains(' ');
    Secret::new(value.as_str().filter(valid)?)
});

const URL: Kind<String> = ("an https:// URL, or http:// to loopback", |value| {
    let text = value.as_str()?;
    let uri = whole_uri(text).filter(|_| !text.contains(['@', '?', '#']))?; // no user, no query
    let scheme = uri.scheme_str()?;
    let safe = scheme == "https" || scheme == "http" && is_loopback(&uri);
    safe.then(|| text.to_owned())
});

/// A URL with scheme and host, and with a valid port, if any.
fn whole_uri(text: &str) -> Option<http::Uri> {
    let uri: http::Uri = text.parse().ok()?;
    let (host, port) = (uri.host().filter(|host| !host.is_empty())?, uri.port_u16());
    let portless = uri.authority()?.as_str().ends_with(host);
    (uri.scheme().is_some() && port.map_or(portless, |port| port > 0)).then_some(uri)
}

// ─── replies ─────────────────────────────────────────────────────────────────────────────────
// In: a status, and a message that says what to do. Out: an answer of ai-mux's own, in the one
// JSON shape that both vendors' SDKs show.

struct Reply {
    /// 0: nobody hears it, it is only logged, as the connection is broken off.
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

    /// The answer, head and body, and how many bytes of it are body; `last`: the connection closes.
    fn to_bytes(&self, head_only: bool, last: bool) -> (Vec<u8>, u64) {
        let status = http::StatusCode::from_u16(self.status).unwrap_or_default();
        let upgrade = "upgrade: HTTP/1.1\r\nconnection: upgrade\r\n";
        let (kind, extra) = match self.status {
            400 => ("invalid_request_error", ""),
            401 => ("authentication_error", "www-authenticate: Bearer\r\n"),
            403 => ("permission_error", ""),
            404 => ("not_found_error", ""),
            408 | 504 => ("timeout_error", ""),
            413 | 431 => ("request_too_large", ""),
            426 => ("invalid_request_error", upgrade),
            _ => ("api_error", ""),
        };
        let code = status.canonical_reason().unwrap_or_default();
        let code = code.to_ascii_lowercase().replace(' ', "_");
        let error = json!({ "type": kind, "message": self.message, "param": null, "code": code });
        let error = json!({ "type": "error", "error": error }).to_string();
        let is_health = self.status == 200;
        let body = if is_health { &self.message } else { &error };
        let again = match (self.retry_after, self.status) {
            (Some(wait), _) => format!("retry-after: {}\r\n", wait.as_secs()),
            // Trying again cannot help; without this, Claude Code does so for minutes, silently.
            (None, 400..=407 | 409..500 | 503) => "x-should-retry: false\r\n".into(),
            _ => String::new(),
        };
        let close = if last { "connection: close\r\n" } else { "" };
        let (date, length) = (httpdate::fmt_http_date(SystemTime::now()), body.len());
        let body = if head_only { "" } else { body };
        let text = format!(
            "HTTP/1.1 {status}\r\ndate: {date}\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{extra}{again}{close}\r\n{body}"
        );
        (text.into_bytes(), body.len() as u64)
    }
}

/// For a connection to be broken off: the answer has begun already, or there is nobody to answer.
fn broken(why: impl Into<String>) -> Reply {
    Reply::new(0, why)
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
// In: records of this program and its crates. Out: lines on standard error. No secret gets here;
// what a client chose does only if it was checked or escaped.

/// One line per request.
fn log_line(exchange: &Exchange, ended: Option<String>) {
    let (peer, head, report) = (exchange.stream.peer, &exchange.head, &exchange.report);
    let path = path_of(&head.target);
    let path = path.get(..TEXT_SHOWN).unwrap_or(path); // ASCII, says the gate
    let words = [&report.user, report.provider, &head.method, path];
    let [user, provider, method, path] = words.map(|w| if w.is_empty() { "-" } else { w });
    let (status, bytes, first) = (report.status, report.bytes, report.first);
    let first = first.map_or("-".into(), |first| format!("{}ms", first.as_millis()));
    let total = exchange.started.elapsed().as_millis();
    let mut line = format!(
        "peer={peer} user={user} provider={provider} method={method} path={path} \
         status={status} bytes={bytes} first={first} total={total}ms"
    );
    if let Some(id) = report.request_id.as_ref().filter(|_| status >= 400) {
        let id = id.to_str().unwrap_or_default();
        let id = id.get(..TEXT_SHOWN).unwrap_or(id);
        line += &format!(" request-id={}", id.replace([' ', '"', '\t'], "?"));
    }
    if let Some(why) = ended {
        line += &format!(" ended={why:?}");
    }
    info!("{line}");
}

/// Header fields for the log: the names of all but a long or secret one, the values of those that
/// are known to hold neither a secret nor anything personal.
fn shown(headers: &HeaderMap, users: &[User]) -> String {
    const HARMLESS: &str = "accept accept-encoding anthropic-beta anthropic-version connection \
        content-encoding content-length content-type date request-id retry-after \
        transfer-encoding user-agent x-request-id x-should-retry";
    let loggable = |text: &[u8]| text.len() <= TEXT_SHOWN && !has_token(text, users);
    let headers = headers.iter().filter(|(name, _)| loggable(name.as_ref()));
    let shown = headers.map(|(name, value)| {
        let harmless = HARMLESS.split(' ').any(|known| name == known);
        if harmless && loggable(value.as_bytes()) {
            return format!("{name}: {value:?}");
        }
        format!("{name}: ({} bytes)", value.len())
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// Whether a text, as far as the log shows it, has a user's token in it; in lower case, too, as the
/// names of headers are. Each comparison takes constant time: the sender is not known yet.
fn has_token(text: &[u8], users: &[User]) -> bool {
    let text = text.to_ascii_lowercase();
    users.iter().any(|user| {
        let token = user.token.expose().to_ascii_lowercase();
        let mut parts = text.windows(token.len()).take(TEXT_SHOWN);
        parts.any(|part| part.ct_eq(token.as_bytes()).into())
    })
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
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        let time = if self.timed { &format!("{now} ") } else { "" };
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let text = format_args!("{time}{}", record.args());
            let mut timed = log::Record::builder();
            timed.metadata(record.metadata().clone()).args(text);
            self.logger.log(&timed.build());
        }));
    }

    fn flush(&self) {}
}

fn start_log(level: LevelFilter) {
    // At trace, ureq prints heads with tokens in them; at warn, rustls what anyone sends it.
    let logger = simple_logger::SimpleLogger::new().with_level(LevelFilter::Error);
    let logger = logger.with_module_level("ai_mux", level);
    // A panic's message could hold anything; its place is enough. Not eprintln!, as in `main`.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or(String::new(), ToString::to_string);
        let _ = writeln!(io::stderr(), "ERROR [ai_mux] panic at {place}");
    }));
    log::set_max_level(level);
    // JOURNAL_STREAM names the journal's device and inode; what systemd starts indirectly inherits
    // it, and may write elsewhere (systemd.exec(5)).
    let place = fs::metadata("/dev/stderr").map(|meta| format!("{}:{}", meta.dev(), meta.ino()));
    let timed = place.ok() != Some(std::env::var("JOURNAL_STREAM").unwrap_or_default());
    let _ = log::set_boxed_logger(Box::new(Log { logger, timed })); // fails only if there is one
}

// ─── secret ──────────────────────────────────────────────────────────────────────────────────

mod secret {
    //! A token that can be read in one way only.

    /// Never empty, and ASCII without controls, so that it fits a header.
    #[derive(Clone, PartialEq)]
    pub struct Secret(std::sync::Arc<str>);

    impl Secret {
        pub fn new(text: &str) -> Option<Secret> {
            let printable = text.bytes().all(|b| matches!(b, b' '..=b'~'));
            let valid = !text.is_empty() && text.trim() == text && printable;
            valid.then(|| Secret(text.into()))
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
