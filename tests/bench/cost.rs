//! What ai-mux costs, beside nginx doing the same and beside no proxy at all.
//!
//! ```sh
//! cargo bench --bench cost                    # everything, a quarter of an hour
//! cargo bench --bench cost -- --quick         # a smoke run, its figures are rough
//! cargo bench --bench cost -- memory tls      # some sections: start, memory, requests, streams, flood, tls
//! cargo bench --bench cost -- --binary PATH   # another build of ai-mux
//! ```
//!
//! This process is both the upstream and the client, so that neither is in the figures: processor time and memory are
//! those of the measured process, read from `/proc`; times are taken with one clock, here. Direct, nginx and ai-mux
//! take turns within every round; a figure is the median of the rounds.

#[path = "../common/mod.rs"]
mod common;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Barrier, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use common::{Authority, Folder, Login, PATIENCE, TOKEN, login, setup};
use rustix::event::epoll;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

/// The ways to the upstream, in the order of the table's columns.
const DIRECT: usize = 0;
const NGINX: usize = 1;
const AI_MUX: usize = 2;
const WAYS: [usize; 3] = [DIRECT, NGINX, AI_MUX];

/// The pace of a stream: that of a fast model.
const PACE: Duration = Duration::from_millis(20);
/// The length of an event: that of a short delta of either vendor.
const EVENT: usize = 120;
/// Stands once in every event, before the instant of its sending, and nowhere else in a response.
const MARK: u8 = b'@';
/// Digits of that instant.
const STAMP: usize = 20;
/// The length of the answer to a request that is not for a stream.
const ANSWER: usize = 1024;
const SMALL: usize = 4 * 1024;
const LARGE: usize = 200_000;
/// The default of `workers`.
const WORKERS: usize = 64;

/// How much is measured.
struct Effort {
    rounds: usize,
    requests: Duration,
    streams: Duration,
    counts: &'static [usize],
    flood: usize,
    bodies: usize,
    starts: usize,
    afterwards: Duration,
}

const FULL: Effort = Effort {
    rounds: 5,
    requests: Duration::from_millis(1000),
    streams: Duration::from_millis(2000),
    counts: &[1, 16, 64, 256, 1000],
    flood: 2_000_000,
    bodies: 1000,
    starts: 21,
    afterwards: Duration::from_secs(60),
};

const QUICK: Effort = Effort {
    rounds: 1,
    requests: Duration::from_millis(100),
    streams: Duration::from_millis(300),
    counts: &[1, 64, 256],
    flood: 100_000,
    bodies: 100,
    starts: 3,
    afterwards: Duration::from_secs(1),
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cost: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut effort = &FULL;
    let mut binary = None;
    let mut words = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {} // cargo adds it
            "--quick" => effort = &QUICK,
            "--binary" => binary = Some(arguments.next().ok_or("--binary needs a path")?.into()),
            option if option.starts_with('-') => return Err(format!("unknown option {option}")),
            _ => words.push(argument),
        }
    }

    let bench = Bench::new(effort, binary)?;
    let mut table = Table::default();
    type Section = fn(&Bench, &mut Table);
    let sections: [(&str, Section); 8] = [
        ("start", Bench::start),
        ("memory", Bench::memory),
        ("requests", |bench, table| bench.requests(table, false)),
        ("streams", |bench, table| bench.streams(table, false)),
        ("flood", |bench, table| bench.flood(table, false)),
        ("tls-requests", |bench, table| bench.requests(table, true)),
        ("tls-streams", |bench, table| bench.streams(table, true)),
        ("tls-flood", |bench, table| bench.flood(table, true)),
    ];
    for (name, section) in sections {
        let chosen = |word: &String| word == name || (word == "tls" && name.starts_with("tls-"));
        if words.is_empty() || words.iter().any(chosen) {
            section(&bench, &mut table);
        }
    }
    table.targets();
    Ok(())
}

// ---- The sections --------------------------------------------------------------------------------------------------

struct Bench {
    effort: &'static Effort,
    binary: PathBuf,
    folder: Folder,
    tls: Tls,
    upstream: Upstream,
}

impl Bench {
    fn new(effort: &'static Effort, binary: Option<PathBuf>) -> Result<Self, String> {
        let version = Command::new("nginx").arg("-v").output();
        let version = version.map_err(|_| "nginx is not installed: apt-get install nginx-light")?;
        let binary = binary.map_or_else(static_binary, Ok)?;
        let folder = Folder::new();
        let tls = Tls::new(&folder);
        let upstream = Upstream::start(tls.server.clone());
        println!("ai-mux   {}", binary.display());
        println!(
            "nginx    {}",
            String::from_utf8_lossy(&version.stderr).trim()
        );
        println!(
            "machine  {} processors; {} rounds, medians; every request is logged by both; {ANSWER} bytes of answer; \
             an event of {EVENT} bytes every {} ms a stream; TLS 1.3 with AES-128-GCM",
            thread::available_parallelism().map_or(0, |n| n.get()),
            effort.rounds,
            PACE.as_millis()
        );
        Ok(Self {
            effort,
            binary,
            folder,
            tls,
            upstream,
        })
    }

    /// The three ways, plain or over TLS; `workers` is for ai-mux, none being its default.
    fn ways(&self, workers: Option<usize>, tls: bool) -> [Way; 3] {
        [self.direct(tls), self.nginx(tls), self.ai_mux(workers, tls)]
    }

    fn direct(&self, tls: bool) -> Way {
        let address = if tls {
            self.upstream.tls
        } else {
            self.upstream.plain
        };
        Way {
            process: None,
            address,
            tls: tls.then(|| self.tls.client.clone()),
        }
    }

    fn nginx(&self, tls: bool) -> Way {
        let address = setup::free_address();
        let folder = self.folder.0.join(format!("nginx-{}", address.port()));
        fs::create_dir_all(&folder).expect("create a folder"); // one before it may have had the port
        let config = folder.join("nginx.conf");
        let secure = if tls { "ssl" } else { "" };
        // The limits on requests per connection are nginx's own, far too low for a benchmark.
        let text = format!(
            "daemon off; worker_processes 1; worker_rlimit_nofile 8192; pid nginx.pid; error_log error.log;\n\
             events {{ worker_connections 8192; }}\n\
             http {{ access_log access.log; keepalive_requests 1000000000; client_body_buffer_size 1m;\n\
             client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;\n\
             upstream vendor {{ server {}; keepalive 1024; keepalive_requests 1000000000; }}\n\
             server {{ listen {address} {secure}; ssl_certificate {certificate}; ssl_certificate_key {key};\n\
             ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256; ssl_ecdh_curve X25519;\n\
             location / {{ proxy_pass http://vendor; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
             proxy_set_header Authorization \"Bearer fixed\"; proxy_buffering off; }} }} }}\n",
            self.upstream.plain,
            certificate = self.tls.certificate.display(),
            key = self.tls.key.display(),
        );
        fs::write(&config, text).expect("write nginx.conf");
        let mut command = Command::new("nginx");
        command
            .arg("-p")
            .arg(&folder)
            .arg("-c")
            .arg(&config)
            .stderr(Stdio::null());
        self.launch(command, address, tls)
    }

    fn ai_mux(&self, workers: Option<usize>, tls: bool) -> Way {
        let address = setup::free_address();
        let folder = self.folder.0.join(format!("ai-mux-{}", address.port()));
        for provider in ["claude", "chatgpt"] {
            login::save(
                &folder,
                provider,
                &Login::new(provider, 86_400).file(provider),
            );
        }
        let mut text = format!(
            "listen: '{address}'\nstate_dir: '{}'\nusers: [{{name: bench, token: {TOKEN}}}]\nproviders:\n\
             - {{name: claude, base_url: 'http://{upstream}'}}\n- {{name: chatgpt, base_url: 'http://{upstream}'}}\n",
            folder.display(),
            upstream = self.upstream.plain,
        );
        if let Some(workers) = workers {
            text += &format!("workers: {workers}\n");
        }
        if tls {
            let (certificate, key) = (self.tls.certificate.display(), self.tls.key.display());
            text +=
                &format!("tls: {{enabled: true, cert_path: '{certificate}', key_path: '{key}'}}\n");
        }
        let config = folder.join("config.yaml");
        fs::write(&config, text).expect("write the configuration");
        let log = fs::File::create(folder.join("log")).expect("create the log");
        let mut command = Command::new(&self.binary);
        command.arg("--config").arg(&config).stderr(log);
        self.launch(command, address, tls)
    }

    /// Starts a proxy, and returns once it has answered a request.
    fn launch(&self, mut command: Command, address: SocketAddr, tls: bool) -> Way {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("start a proxy");
        let way = Way {
            process: Some(Process(child)),
            address,
            tls: tls.then(|| self.tls.client.clone()),
        };
        let given_up = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(address).is_err() {
            assert!(
                Instant::now() < given_up,
                "{command:?} does not listen on {address}"
            );
            thread::sleep(Duration::from_micros(100));
        }
        way.connect().exchange(&request("claude", "", SMALL));
        way
    }

    /// Runs `measure` on each way in turn, `rounds` times, and returns the rounds of each figure of each way.
    fn rounds<const N: usize>(
        &self,
        ways: &[Way; 3],
        measure: impl Fn(&Way) -> [f64; N],
    ) -> [[Vec<f64>; 3]; N] {
        let mut figures = [(); N].map(|()| [const { Vec::new() }; 3]);
        for _ in 0..self.effort.rounds {
            for way in WAYS {
                for (figure, value) in figures.iter_mut().zip(measure(&ways[way])) {
                    figure[way].push(value);
                }
            }
        }
        figures
    }

    fn start(&self, table: &mut Table) {
        table.section("start");
        let mut size = [const { Vec::new() }; 3];
        size[AI_MUX].push(fs::metadata(&self.binary).expect("find the binary").len() as f64);
        table.row("binary", Unit::Bytes, size);
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..self.effort.starts {
            for way in [NGINX, AI_MUX] {
                let begun = Instant::now();
                let running = if way == NGINX {
                    self.nginx(false)
                } else {
                    self.ai_mux(None, false)
                };
                times[way].push(seconds(begun));
                drop(running);
            }
        }
        table.row("exec to first proxied answer", Unit::Seconds, times);
    }

    fn memory(&self, table: &mut Table) {
        let count = self.effort.bodies;
        table.section(&format!(
            "resident memory: {WORKERS} workers, {count} bodies of 200 kB"
        ));
        let [_, nginx, ours] = self.ways(None, false);
        let ways = [&nginx, &ours];
        table.row("idle", Unit::Bytes, resident(ways.map(idle)));
        let bodies = ways.map(|way| {
            thread::scope(|scope| {
                for _ in 0..16 {
                    scope.spawn(|| {
                        let (mut client, request) = (way.connect(), request("claude", "", LARGE));
                        (0..count.div_ceil(16)).for_each(|_| client.exchange(&request));
                    });
                }
            });
            way.resident()
        });
        table.row("after the bodies", Unit::Bytes, resident(bodies));

        let wait = self.effort.afterwards;
        table.section(&format!(
            "resident memory: 256 workers, 256 streams, {} s of rest",
            wait.as_secs()
        ));
        let [_, nginx, ours] = self.ways(Some(256), false);
        let ways = [&nginx, &ours];
        let before = ways.map(idle);
        table.row("idle", Unit::Bytes, resident(before));
        let during = ways.map(|way| {
            let mut resident = 0.0;
            self.stream(way, 256, |way| resident = way.resident());
            resident
        });
        table.row("with the streams", Unit::Bytes, resident(during));
        thread::sleep(wait);
        let after = ways.map(Way::resident);
        table.row("after the rest", Unit::Bytes, resident(after));
        table.row(
            "after the rest, above idle",
            Unit::Bytes,
            resident([after[0] - before[0], after[1] - before[1]]),
        );
    }

    fn requests(&self, table: &mut Table, tls: bool) {
        table.section(if tls { "requests over TLS" } else { "requests" });
        let ways = self.ways(None, tls);
        for (size, name) in [(SMALL, "4 KiB"), (LARGE, "200 kB")] {
            for connections in [1, 16] {
                let [p50, p99, cpu] =
                    self.rounds(&ways, |way| self.request_rate(way, size, connections));
                let label = format!(
                    "{name}, {connections} connection{}",
                    if connections == 1 { "" } else { "s" }
                );
                table.row(&format!("{label}, p50"), Unit::Seconds, p50);
                table.row(&format!("{label}, p99"), Unit::Seconds, p99);
                table.row(&format!("{label}, processor"), Unit::Seconds, cpu);
            }
        }
    }

    /// p50, p99 and processor time of a request.
    fn request_rate(&self, way: &Way, size: usize, connections: usize) -> [f64; 3] {
        let together = Barrier::new(connections + 1);
        thread::scope(|scope| {
            let client = || {
                let (mut client, request) = (way.connect(), request("claude", "", size));
                client.exchange(&request);
                together.wait(); // all are connected
                together.wait(); // the processor time is read
                let (begun, mut times) = (Instant::now(), Vec::new());
                while begun.elapsed() < self.effort.requests {
                    let sent = Instant::now();
                    client.exchange(&request);
                    times.push(seconds(sent));
                }
                together.wait(); // all are done
                together.wait(); // and it is read again: a thread that ended would take its time with it
                times
            };
            let clients: Vec<_> = (0..connections).map(|_| scope.spawn(client)).collect();
            together.wait();
            let before = way.processor();
            together.wait();
            together.wait();
            let used = way.processor().since(&before);
            together.wait();
            let mut times: Vec<f64> = clients
                .into_iter()
                .flat_map(|c| c.join().expect("a client"))
                .collect();
            [
                quantile(&mut times, 0.5),
                quantile(&mut times, 0.99),
                used / times.len() as f64,
            ]
        })
    }

    fn streams(&self, table: &mut Table, tls: bool) {
        for &count in self.effort.counts {
            let workers = count.max(WORKERS);
            let over = if tls { " over TLS" } else { "" };
            table.section(&format!(
                "{count} stream{}{over}, {workers} workers",
                if count == 1 { "" } else { "s" }
            ));
            let ways = self.ways(Some(workers), tls);
            let figures = self.rounds(&ways, |way| {
                let mut resident = 0.0;
                let run = self.stream(way, count, |_| resident = way.resident());
                let [mut first, mut delays] = [run.first, run.delays];
                let per_event = run.processor / delays.len() as f64;
                [
                    quantile(&mut delays, 0.5),
                    quantile(&mut delays, 0.99),
                    per_event * 1e5,
                    quantile(&mut first, 0.5),
                    delays.len() as f64 / run.events as f64 * 100.0,
                    resident,
                ]
            });
            let [p50, p99, cpu, first, alone, resident] = figures;
            let added = [&p50, &p99].map(|figure| {
                let base = median(&figure[DIRECT]);
                [
                    vec![],
                    figure[NGINX].iter().map(|v| v - base).collect(),
                    figure[AI_MUX].iter().map(|v| v - base).collect(),
                ]
            });
            table.row("delay of an event, p50", Unit::Seconds, p50);
            table.row("delay of an event, p99", Unit::Seconds, p99);
            let [added_p50, added_p99] = added;
            table.row("added delay, p50", Unit::Seconds, added_p50);
            table.row("added delay, p99", Unit::Seconds, added_p99);
            table.row("processor for 100,000 events", Unit::Seconds, cpu);
            table.row("connecting to first event, p50", Unit::Seconds, first);
            table.row("events in a piece of their own", Unit::Percent, alone);
            table.row("resident", Unit::Bytes, resident);
        }
    }

    /// Opens `count` streams one after the other, reads them all for a while, and has `while_open` look before they close.
    fn stream(&self, way: &Way, count: usize, while_open: impl FnOnce(&Way)) -> Streamed {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
        let mut run = Streamed::default();
        let mut clients: Vec<Client> = (0..count)
            .map(|index| {
                let begun = Instant::now();
                let mut client = way.connect();
                // Spread over one pace, as independent streams are.
                let phase = PACE.as_nanos() as usize * index / count;
                client
                    .write_all(&request("claude", &format!("?phase={phase}"), SMALL))
                    .expect("send a request");
                while !client.piece().contains(&MARK) {}
                run.first.push(seconds(begun));
                client
            })
            .collect();
        for (index, client) in clients.iter().enumerate() {
            client
                .wire
                .socket()
                .set_nonblocking(true)
                .expect("set a socket");
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&poll, client.wire.socket(), data, epoll::EventFlags::IN).expect("epoll");
        }
        // What came while the streams were opened is read before the clock starts.
        read_streams(&poll, &mut clients, PACE * 5, &mut Streamed::default());
        let before = way.processor();
        read_streams(&poll, &mut clients, self.effort.streams, &mut run);
        run.processor = way.processor().since(&before);
        while_open(way);
        run
    }

    fn flood(&self, table: &mut Table, tls: bool) {
        table.section(if tls {
            "one stream flat out over TLS"
        } else {
            "one stream flat out"
        });
        let ways = self.ways(None, tls);
        for (name, query, events) in [
            ("", "flood", 4 * self.effort.flood),
            (", a write each", "singly", self.effort.flood),
        ] {
            let [rate, bytes, cpu] = self.rounds(&ways, |way| {
                let mut client = way.connect();
                client.exchange(&request("claude", "", SMALL));
                let before = way.processor();
                client
                    .write_all(&request("claude", &format!("?{query}={events}"), SMALL))
                    .expect("send a request");
                let (begun, mut seen) = (Instant::now(), 0);
                while seen < events {
                    seen += marks(client.piece());
                }
                let rate = events as f64 / seconds(begun);
                [
                    rate,
                    rate * EVENT as f64,
                    way.processor().since(&before) / events as f64 * 1e5,
                ]
            });
            table.row(&format!("events a second{name}"), Unit::Count, rate);
            table.row(
                &format!("bytes of events a second{name}"),
                Unit::Rate,
                bytes,
            );
            table.row(
                &format!("processor for 100,000 events{name}"),
                Unit::Seconds,
                cpu,
            );
        }
    }
}

/// The resident memory of a process that has served one request to each provider.
fn idle(way: &Way) -> f64 {
    for provider in ["claude", "chatgpt"] {
        way.connect().exchange(&request(provider, "", SMALL));
    }
    thread::sleep(Duration::from_millis(500));
    way.resident()
}

/// A row of nginx's and ai-mux's memory.
fn resident([nginx, ours]: [f64; 2]) -> [Vec<f64>; 3] {
    [vec![], vec![nginx], vec![ours]]
}

/// What a run of streams showed.
#[derive(Default)]
struct Streamed {
    /// From connecting to the first event, of each stream.
    first: Vec<f64>,
    /// Of each event that arrived in a piece of its own. Others count as events only.
    delays: Vec<f64>,
    events: usize,
    processor: f64,
}

fn read_streams(
    poll: impl std::os::fd::AsFd,
    clients: &mut [Client],
    time: Duration,
    run: &mut Streamed,
) {
    let begun = Instant::now();
    let mut ready = Vec::with_capacity(256);
    while begun.elapsed() < time {
        let timeout = rustix::event::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        ready.clear();
        epoll::wait(
            &poll,
            rustix::buffer::spare_capacity(&mut ready),
            Some(&timeout),
        )
        .expect("epoll");
        for event in &ready {
            let piece = clients[event.data.u64() as usize].piece();
            let now = since_start();
            let count = marks(piece);
            run.events += count;
            if count == 1
                && let Some(sent) = stamp(piece)
            {
                run.delays.push(now.saturating_sub(sent) as f64 / 1e9);
            }
        }
    }
}

// ---- The client ----------------------------------------------------------------------------------------------------

/// A way to the upstream: where to connect, and the process in between.
struct Way {
    process: Option<Process>,
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
}

impl Way {
    fn connect(&self) -> Client {
        let socket = TcpStream::connect(self.address).expect("connect");
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("set a socket");
        Client {
            wire: Wire::client(socket, self.tls.as_ref()),
            buffer: vec![0; 64 * 1024],
        }
    }

    fn processor(&self) -> Processor {
        Processor(self.process.as_ref().map(Process::threads))
    }

    fn resident(&self) -> f64 {
        self.process.as_ref().map_or(f64::NAN, Process::resident)
    }
}

struct Client {
    wire: Wire,
    buffer: Vec<u8>,
}

impl Client {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.write_all(bytes)
    }

    /// What one read gives; nothing when there was nothing to read after all.
    fn piece(&mut self) -> &[u8] {
        match self.wire.read(&mut self.buffer) {
            Ok(0) => panic!("the stream has ended"),
            Ok(n) => &self.buffer[..n],
            Err(error) if error.kind() == ErrorKind::WouldBlock => &[],
            Err(error) => panic!("read a stream: {error}"),
        }
    }

    /// A request and its whole answer.
    fn exchange(&mut self, request: &[u8]) {
        self.write_all(request).expect("send a request");
        let mut filled = 0;
        let (mut head, mut whole) = (0, usize::MAX);
        while filled < whole {
            let n = self
                .wire
                .read(&mut self.buffer[filled..])
                .expect("read an answer");
            assert_ne!(n, 0, "the connection was closed before the answer");
            filled += n;
            if head == 0 {
                head = head_length(&self.buffer[..filled]).unwrap_or(0);
                if head > 0 {
                    let text = String::from_utf8_lossy(&self.buffer[..head]);
                    assert!(text.starts_with("HTTP/1.1 200 "), "not an answer: {text}");
                    whole = head + content_length(&self.buffer[..head]);
                }
            }
        }
        assert_eq!(filled - head, ANSWER, "the length of an answer");
    }
}

fn request(provider: &str, query: &str, size: usize) -> Vec<u8> {
    let mut request = format!(
        "POST /{provider}/v1/messages{query} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\
         user-agent: cost/1\r\naccept: application/json\r\nanthropic-version: 2023-06-01\r\n\
         content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    )
    .into_bytes();
    request.resize(request.len() + size, b'x');
    request
}

fn marks(piece: &[u8]) -> usize {
    piece.iter().filter(|&&byte| byte == MARK).count()
}

fn stamp(piece: &[u8]) -> Option<u64> {
    let start = piece.iter().position(|&byte| byte == MARK)? + 1;
    std::str::from_utf8(piece.get(start..start + STAMP)?)
        .ok()?
        .parse()
        .ok()
}

// ---- The upstream --------------------------------------------------------------------------------------------------

/// Stands in for both vendors: a thread a connection, and one that sends the events of all streams.
struct Upstream {
    plain: SocketAddr,
    tls: SocketAddr,
}

/// A stream to be paced: when its next event is due, and where it goes.
type Paced = (u64, Wire);

impl Upstream {
    fn start(tls: Arc<ServerConfig>) -> Self {
        let (pacer, streams) = mpsc::channel();
        thread::spawn(move || pace(&streams));
        let listen = |tls: Option<Arc<ServerConfig>>| {
            let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
            let address = listener.local_addr().expect("an address");
            let pacer = pacer.clone();
            thread::spawn(move || {
                for socket in listener.incoming() {
                    let pacer = pacer.clone();
                    let wire = Wire::server(socket.expect("accept"), tls.as_ref());
                    // An error here is a connection that was closed.
                    thread::spawn(move || serve(wire, &pacer));
                }
            });
            address
        };
        Self {
            plain: listen(None),
            tls: listen(Some(tls)),
        }
    }
}

/// Serves one connection until it closes, or becomes a stream.
fn serve(mut wire: Wire, pacer: &mpsc::Sender<Paced>) -> io::Result<()> {
    const STREAM: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {ANSWER}\r\n\r\n"
    )
    .into_bytes();
    answer.resize(answer.len() + ANSWER, b'y');
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let mut filled = 0;
        let head = loop {
            let n = wire.read(&mut buffer[filled..])?;
            if n == 0 {
                return Ok(());
            }
            filled += n;
            if let Some(head) = head_length(&buffer[..filled]) {
                break head;
            }
        };
        let line = String::from_utf8_lossy(&buffer[..head])
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        let mut missing = content_length(&buffer[..head])
            .checked_sub(filled - head)
            .expect("one request at a time");
        while missing > 0 {
            let n = wire.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            missing -= n;
        }
        let query = |name: &str| -> Option<u64> {
            let value = line.split_once(&format!("?{name}="))?.1;
            value.split(' ').next()?.parse().ok()
        };
        if let Some(phase) = query("phase") {
            let mut first = STREAM.to_vec();
            first.extend_from_slice(&event(since_start()));
            wire.write_all(&first)?;
            let pace = PACE.as_nanos() as u64;
            let due = (since_start() / pace + 1) * pace + phase;
            let _ = pacer.send((due, wire));
            return Ok(());
        }
        if let Some(events) = query("flood").or(query("singly")) {
            wire.write_all(STREAM)?;
            let size = if query("flood").is_some() { 500 } else { 1 };
            let batch = event(since_start()).repeat(size);
            for _ in 0..events / size as u64 {
                wire.write_all(&batch)?;
            }
            wire.write_all(b"0\r\n\r\n")?;
            continue;
        }
        wire.write_all(&answer)?;
    }
}

/// Sends every stream its events, each in a write of its own, when they are due. A stream ends when its reader is gone.
fn pace(streams: &mpsc::Receiver<Paced>) {
    let mut queue: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut wires: HashMap<usize, Wire> = HashMap::new();
    let mut number = 0;
    loop {
        let wait = queue.peek().map_or(u64::MAX / 2, |Reverse((due, _))| {
            due.saturating_sub(since_start())
        });
        match streams.recv_timeout(Duration::from_nanos(wait)) {
            Ok((due, wire)) => {
                number += 1;
                queue.push(Reverse((due, number)));
                wires.insert(number, wire);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while let Some(mut next) = queue.peek_mut().filter(|next| next.0.0 <= since_start()) {
            let Reverse((due, number)) = *next;
            let sent = wires
                .get_mut(&number)
                .map(|wire| wire.write_all(&event(since_start())));
            if let Some(Ok(())) = sent {
                *next = Reverse((due + PACE.as_nanos() as u64, number));
            } else {
                wires.remove(&number);
                std::collections::binary_heap::PeekMut::pop(next);
            }
        }
    }
}

/// A chunk that holds one event, stamped.
fn event(now: u64) -> Vec<u8> {
    let mut chunk = format!(
        "{EVENT:x}\r\ndata: {{\"at\":\"{}{now:0STAMP$}\",\"text\":\"",
        MARK as char
    )
    .into_bytes();
    let start = chunk
        .iter()
        .position(|&byte| byte == b'\n')
        .expect("a line")
        + 1;
    chunk.resize(start + EVENT - 4, b'.');
    chunk.extend_from_slice(b"\"}\n\n\r\n");
    chunk
}

/// The one clock: nanoseconds since the first look at it.
fn since_start() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64
}

// ---- HTTP and TLS, as much as is needed ----------------------------------------------------------------------------

fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|end| end == b"\r\n\r\n")
        .map(|start| start + 4)
}

fn content_length(head: &[u8]) -> usize {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let value = head
        .split("\r\ncontent-length:")
        .nth(1)
        .unwrap_or_else(|| panic!("no length: {head}"));
    value
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .parse()
        .expect("a length")
}

/// Either end of a connection, plain or TLS.
enum Wire {
    Plain(TcpStream),
    Client(Box<StreamOwned<ClientConnection, TcpStream>>),
    Server(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Wire {
    fn client(socket: TcpStream, tls: Option<&Arc<ClientConfig>>) -> Self {
        socket.set_nodelay(true).expect("set a socket");
        let Some(config) = tls else {
            return Self::Plain(socket);
        };
        let name = ServerName::try_from("localhost").expect("a name");
        let connection = ClientConnection::new(config.clone(), name).expect("TLS");
        Self::Client(Box::new(StreamOwned::new(connection, socket)))
    }

    fn server(socket: TcpStream, tls: Option<&Arc<ServerConfig>>) -> Self {
        socket.set_nodelay(true).expect("set a socket");
        let Some(config) = tls else {
            return Self::Plain(socket);
        };
        let connection = ServerConnection::new(config.clone()).expect("TLS");
        Self::Server(Box::new(StreamOwned::new(connection, socket)))
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(stream) => &stream.sock,
            Self::Server(stream) => &stream.sock,
        }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Client(stream) => stream.read(buffer),
            Self::Server(stream) => stream.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A certificate of our own, and one suite for everyone.
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    fn new(folder: &Folder) -> Self {
        let authority = Authority::new();
        let (certificate, key) = (folder.0.join("certificate.pem"), folder.0.join("key.pem"));
        fs::write(&certificate, &authority.cert_pem).expect("write the certificate");
        fs::write(&key, &authority.key_pem).expect("write the key");
        let shown = CertificateDer::from_pem_file(&certificate).expect("a certificate");
        let private = PrivateKeyDer::from_pem_file(&key).expect("a key");
        let one_suite = Arc::new(CryptoProvider {
            cipher_suites: vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256],
            kx_groups: vec![ring::kx_group::X25519],
            ..ring::default_provider()
        });
        let mut roots = RootCertStore::empty();
        roots.add(shown.clone()).expect("a root");
        let client = ClientConfig::builder_with_provider(one_suite.clone());
        let client = client
            .with_safe_default_protocol_versions()
            .expect("TLS 1.3");
        let server = ServerConfig::builder_with_provider(one_suite);
        let server = server
            .with_safe_default_protocol_versions()
            .expect("TLS 1.3");
        let server = server
            .with_no_client_auth()
            .with_single_cert(vec![shown], private);
        Self {
            certificate,
            key,
            client: Arc::new(client.with_root_certificates(roots).with_no_client_auth()),
            server: Arc::new(server.expect("a pair")),
        }
    }
}

// ---- Processes -----------------------------------------------------------------------------------------------------

/// A running proxy; ends with its value.
struct Process(Child);

impl Process {
    /// The process and its children: nginx works in a child of its own.
    fn family(&self) -> Vec<u32> {
        let main = self.0.id();
        let children =
            fs::read_to_string(format!("/proc/{main}/task/{main}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok());
        std::iter::once(main).chain(children).collect()
    }

    /// The processor time of every thread, in seconds.
    fn threads(&self) -> HashMap<String, f64> {
        let mut threads = HashMap::new();
        for process in self.family() {
            for task in fs::read_dir(format!("/proc/{process}/task"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else {
                    continue;
                };
                let nanoseconds: f64 = text
                    .split(' ')
                    .next()
                    .and_then(|n| n.parse().ok())
                    .expect("schedstat");
                threads.insert(
                    task.file_name().to_string_lossy().into_owned(),
                    nanoseconds / 1e9,
                );
            }
        }
        threads
    }

    fn resident(&self) -> f64 {
        let of = |process| -> Option<f64> {
            let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
            let value = text.split("VmRSS:").nth(1)?.split_whitespace().next()?;
            Some(value.parse::<f64>().ok()? * 1024.0)
        };
        self.family().into_iter().filter_map(of).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // nginx's child ends when the channel to its parent closes; SIGTERM ends both properly.
        let id = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Processor time by thread. `/proc/PID/stat` would count to 10 ms only, too coarse for one stream.
struct Processor(Option<HashMap<String, f64>>);

impl Processor {
    /// Seconds used since then; not a number where there is no process.
    fn since(&self, before: &Self) -> f64 {
        let (Some(now), Some(before)) = (&self.0, &before.0) else {
            return f64::NAN;
        };
        now.iter()
            .map(|(thread, now)| now - before.get(thread).unwrap_or(&0.0))
            .sum()
    }
}

/// The static build, as it is shipped; where that cannot be made, the build that cargo made for this benchmark.
fn static_binary() -> Result<PathBuf, String> {
    let dynamic = PathBuf::from(env!("CARGO_BIN_EXE_ai-mux"));
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let folder = dynamic.ancestors().nth(2).ok_or("no target folder")?;
    println!("building for {target}");
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--bin",
            "ai-mux",
            "--target",
            &target,
            "--target-dir",
        ])
        .arg(folder)
        .env(format!("CC_{}", target.replace('-', "_")), "musl-gcc")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    if built.is_ok_and(|status| status.success()) {
        return Ok(folder.join(target).join("release/ai-mux"));
    }
    println!(
        "NOT the static build, which could not be made (rustup target add {target}; apt-get install musl-tools)"
    );
    Ok(dynamic)
}

// ---- The table -----------------------------------------------------------------------------------------------------

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

fn median(values: &[f64]) -> f64 {
    quantile(&mut values.to_vec(), 0.5)
}

enum Unit {
    Seconds,
    Bytes,
    Rate,
    Count,
    Percent,
}

impl Unit {
    fn text(&self, value: f64) -> String {
        match self {
            _ if value.is_nan() => "–".to_owned(),
            Self::Seconds if value.abs() < 0.9995e-3 => format!("{:.1} µs", value * 1e6),
            Self::Seconds if value.abs() < 0.9995 => format!("{:.2} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::Bytes => format!("{:.2} MiB", value / f64::from(1 << 20)),
            Self::Rate => format!("{:.0} MB/s", value / 1e6),
            Self::Count => format!("{value:.0}"),
            Self::Percent => format!("{value:.1} %"),
        }
    }
}

/// A target for ai-mux: a limit of its own, or a multiple of nginx's figure in the same run.
enum Target {
    Limit(f64, Unit),
    UpToNginx(f64),
    BeyondNginx(f64),
}
use Target::{BeyondNginx, Limit, UpToNginx};

/// Prints as it is filled, and remembers the medians by section and label.
#[derive(Default)]
struct Table {
    section: String,
    /// Section, label, and the medians of the three ways.
    medians: Vec<(String, String, [f64; 3])>,
}

impl Table {
    fn section(&mut self, name: &str) {
        self.section = name.to_owned();
        println!();
        println!(
            "{name:<44}{:>12}{:>12}{:>12}{:>10}{:>10}",
            "direct", "nginx", "ai-mux", "÷ nginx", "÷ direct"
        );
    }

    fn row(&mut self, label: &str, unit: Unit, rounds: [Vec<f64>; 3]) {
        let medians = rounds.map(|values| median(&values));
        let ratio = |to: usize| match medians[AI_MUX] / medians[to] {
            ratio if ratio.is_finite() => format!("{ratio:.2}"),
            _ => "–".to_owned(),
        };
        let [direct, nginx, ours] = medians.map(|value| unit.text(value));
        println!(
            "  {label:<42}{direct:>12}{nginx:>12}{ours:>12}{:>10}{:>10}",
            ratio(NGINX),
            ratio(DIRECT)
        );
        self.medians
            .push((self.section.clone(), label.to_owned(), medians));
    }

    /// What ai-mux promises itself, of the figures that this run has.
    fn targets(&self) {
        const MIB: f64 = 1024.0 * 1024.0;
        let bodies = "resident memory: 64 workers";
        let streams = "resident memory: 256 workers";
        let paced = "256 streams, ";
        let targets = [
            ("binary", "start", "binary", Limit(2.5 * MIB, Unit::Bytes)),
            (
                "exec to first proxied answer",
                "start",
                "exec to first proxied answer",
                Limit(0.015, Unit::Seconds),
            ),
            (
                "idle, default configuration",
                bodies,
                "idle",
                Limit(3.0 * MIB, Unit::Bytes),
            ),
            (
                "after the bodies of 200 kB",
                bodies,
                "after the bodies",
                Limit(16.0 * MIB, Unit::Bytes),
            ),
            (
                "256 streams",
                streams,
                "with the streams",
                Limit(24.0 * MIB, Unit::Bytes),
            ),
            (
                "256 streams, afterwards above idle",
                streams,
                "after the rest, above idle",
                Limit(4.0 * MIB, Unit::Bytes),
            ),
            (
                "delay per event, 256 streams, p50",
                paced,
                "delay of an event, p50",
                UpToNginx(1.0),
            ),
            (
                "delay per event, 256 streams, p99",
                paced,
                "delay of an event, p99",
                UpToNginx(1.0),
            ),
            (
                "processor per event, 256 streams",
                paced,
                "processor for 100,000 events",
                UpToNginx(1.1),
            ),
            (
                "events a second, one stream flat out",
                "one stream flat out",
                "events a second",
                BeyondNginx(1.2),
            ),
            (
                "request, 4 KiB, 1 connection, p50",
                "requests",
                "4 KiB, 1 connection, p50",
                UpToNginx(1.4),
            ),
            (
                "request, 4 KiB, 16 connections, processor",
                "requests",
                "4 KiB, 16 connections, processor",
                UpToNginx(3.5),
            ),
        ];
        println!("\n{:<46}{:>18}{:>14}", "targets", "target", "here");
        for (name, section, label, target) in targets {
            let plain = self.medians.iter().filter(|row| !row.0.contains("TLS"));
            let found = plain
                .into_iter()
                .find(|row| row.0.starts_with(section) && row.1 == label);
            let Some((_, _, medians)) = found else {
                continue;
            };
            let (ours, of_nginx) = (medians[AI_MUX], medians[AI_MUX] / medians[NGINX]);
            let (held, wanted, here) = match target {
                Limit(limit, unit) => (
                    ours <= limit,
                    format!("≤ {}", unit.text(limit)),
                    unit.text(ours),
                ),
                UpToNginx(limit) => (
                    of_nginx <= limit,
                    format!("≤ {limit} × nginx"),
                    format!("{of_nginx:.2} ×"),
                ),
                BeyondNginx(limit) => (
                    of_nginx >= limit,
                    format!("≥ {limit} × nginx"),
                    format!("{of_nginx:.2} ×"),
                ),
            };
            println!(
                "  {name:<44}{wanted:>18}{here:>14}  {}",
                if held { "held" } else { "NOT HELD" }
            );
        }
    }
}
