//! A long mixed load on the real binary: streams, large bodies, disconnects, bad heads, refreshes, changed
//! login files and upstream faults, at a bounded rate. Every answer is checked byte for byte, and at the end
//! the program must hold no more memory, descriptors and threads than it did.
//!
//! `cargo run --release --example soak -- [MINUTES]`, one by default; `SOAK_SEED` makes another mix, and
//! `AI_MUX` names another binary than the one that it builds.

#[path = "../common/build.rs"]
mod build;
#[path = "../common/mod.rs"]
mod common;
#[path = "../fuzz/random.rs"]
mod random;

use common::http::Framing;
use common::*;
use random::Random;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Clients at once, and how long each rests between two things that it does.
const CLIENTS: u64 = 8;
const REST: Duration = Duration::from_millis(100);
/// The limits that the faults of the upstream run into, and what is longer than both.
const LIMIT: &str = "10s";
const STALL: Duration = Duration::from_secs(12);
/// How much memory may grow after the middle of the run, in KiB, or a tenth if that is more: the allocator grows by
/// steps for six minutes or so. The middle is at a minute at least, so in a run of one minute only `CEILING` binds.
const GROWTH: usize = 2 << 10;
/// What it may be at the end in any case, so that growth up to the middle is bounded, too.
const CEILING: usize = 14 << 10;
/// After a load: upstream connections are pooled for 15 s.
const SETTLING: Duration = Duration::from_secs(20);
/// After the requests that have those closed: idle workers, as many as chance has it, end within 5 s.
const RETIRING: Duration = Duration::from_secs(7);
/// As many as there are workers, so that each of them has been used.
const BURST: u64 = 64;

struct Soak {
    mux: Mux,
    up: Upstream,
    over: AtomicBool,
    done: Mutex<BTreeMap<&'static str, usize>>,
}

fn main() -> ExitCode {
    let minutes = std::env::args().nth(1).map_or(Ok(1), |text| text.parse());
    let Ok(minutes) = minutes else {
        eprintln!("usage: soak [MINUTES]");
        return ExitCode::from(2);
    };
    if std::env::var_os("AI_MUX").is_none() {
        build::build();
    }
    let seed = std::env::var("SOAK_SEED").map_or(1, |text| text.parse().expect("a number"));
    let up = Upstream::at_head(answer);
    let setup = Setup::new(&up).set("log_level", "warn");
    let setup = setup
        .set("request_timeout", LIMIT)
        .set("stream_idle_timeout", LIMIT);
    let soak = Soak {
        mux: setup.start_unheard(),
        up,
        over: AtomicBool::new(false),
        done: Mutex::default(),
    };
    println!("{minutes} min, seed {seed}, {CLIENTS} clients that rest {REST:?} each time");
    match soak.run(Duration::from_secs(60 * minutes), seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

impl Soak {
    fn run(mut self, time: Duration, seed: u64) -> Result<(), String> {
        self.warm_up();
        let (before, begin) = (self.settled(), Instant::now());
        let (middle, failed) = thread::scope(|scope| {
            let clients = (0..CLIENTS).map(|n| {
                let soak = &self;
                scope.spawn(move || soak.until_over(|| soak.client(seed * CLIENTS + n)))
            });
            let mut threads: Vec<_> = clients.collect();
            threads.push(scope.spawn(|| self.until_over(|| self.owner(seed))));
            let middle = self.watch(begin, time);
            self.over.store(true, Ordering::SeqCst);
            let ended = threads.into_iter().map(|thread| thread.join());
            (middle, ended.filter(Result::is_err).count())
        });
        self.report(begin);
        if failed > 0 {
            let log = self.mux.log();
            return Err(format!(
                "{failed} clients met what was not right; log:\n{log}"
            ));
        }
        let after = self.settled();
        for (when, held) in [("before", &before), ("midway", &middle), ("after", &after)] {
            println!("{when:10} {}", shown(held));
        }
        let most = CEILING.min(middle.resident + GROWTH.max(middle.resident / 10));
        if after.resident > most {
            return Err(format!("memory is not back under {most} KiB"));
        }
        if after.descriptors > before.descriptors || after.threads > before.threads {
            return Err("descriptors or threads are left over".to_owned());
        }
        match (self.up.reused(), self.mux.stop(), self.mux.whole_log()) {
            (0, 0, log) if !log.contains("panic") && !log.contains("lost") => Ok(()),
            (reused, code, log) => Err(format!(
                "{reused} refresh tokens spent twice, exit code {code}, log:\n{log}"
            )),
        }
    }

    /// Calls it again and again; a panic in it ends the whole run.
    fn until_over(&self, mut go: impl FnMut()) {
        struct Alarm<'a>(&'a AtomicBool);
        impl Drop for Alarm<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _alarm = Alarm(&self.over);
        while !self.over.load(Ordering::SeqCst) {
            go();
        }
    }

    /// Prints what is held every 10 s until the time is over; returns what was in its middle.
    fn watch(&self, begin: Instant, time: Duration) -> Footprint {
        let (mut middle, mut next) = (None, Duration::ZERO);
        let half = (time / 2).max(Duration::from_secs(60));
        while begin.elapsed() < time && !self.over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(100));
            let held = self.mux.footprint();
            if middle.is_none() && begin.elapsed() >= half {
                middle = Some(held);
            }
            if begin.elapsed() >= next {
                println!("{:5} s {}", next.as_secs(), shown(&held));
                next += Duration::from_secs(10);
            }
        }
        middle.unwrap_or_else(|| self.mux.footprint())
    }

    fn report(&self, begin: Instant) {
        let done = lock(&self.done);
        let count: usize = done.values().sum();
        println!("{count} checks in {} s:", begin.elapsed().as_secs());
        for (what, count) in done.iter() {
            println!("{count:8} {what}");
        }
    }

    fn count(&self, what: &'static str) {
        *lock(&self.done).entry(what).or_default() += 1;
    }

    /// Has all workers busy at the same time.
    fn warm_up(&self) {
        at_once(0..BURST, |seed| {
            let mut client = self.mux.client();
            let ask = Ask {
                what: "stream",
                target: [MESSAGES, RESPONSES][seed as usize % 2],
                seed,
                body: 0,
                size: 20_000,
            };
            ask.send(&mut client, false);
            assert!(client.answer().body == ask.expected(), "another answer");
        });
    }

    /// What it holds when there is nothing to do: one idle upstream connection for each provider.
    fn settled(&self) -> Footprint {
        thread::sleep(SETTLING);
        for target in [MESSAGES, RESPONSES] {
            assert_eq!(self.mux.ask("POST", target, &[], b"").status, 200);
        }
        thread::sleep(RETIRING);
        let deadline = Instant::now() + PATIENCE;
        let mut held = self.mux.footprint();
        loop {
            // The thread of a connection that was closed may still be on its way out.
            thread::sleep(Duration::from_millis(200));
            let now = self.mux.footprint();
            let same = (now.threads, now.descriptors) == (held.threads, held.descriptors);
            if same || Instant::now() > deadline {
                return now;
            }
            held = now;
        }
    }
}

fn shown(held: &Footprint) -> String {
    let Footprint {
        descriptors,
        threads,
        resident,
    } = held;
    format!("{resident:7} KiB {descriptors:5} descriptors {threads:4} threads")
}

/// What an answer or a body is made of: the same on both sides.
fn content(seed: u64, size: usize) -> Vec<u8> {
    Random::new(seed).exactly(size)
}

/// The upstream does as the request's headers tell it.
fn answer(req: &Request, conn: &mut Conn) -> io::Result<()> {
    let number = |name: &str| req.head.get(name).map_or(Ok(0), str::parse).unwrap_or(0);
    let (seed, size) = (number("x-seed"), number("x-size") as usize);
    let body = conn.wire.body(req.head.framing(Framing::Done))?;
    if body != content(seed, number("x-body") as usize) {
        return conn.respond(400, &[], b"the body differs");
    }
    let whole = content(seed + 1, size);
    let (begun, rest) = whole.split_at(size / 2);
    match req.head.get("x-do").unwrap_or_default() {
        "stream" => {
            conn.stream(&[("content-type", "text/event-stream")])?;
            for piece in whole.chunks(100) {
                conn.chunk(piece)?;
                thread::sleep(Duration::from_millis(5));
            }
            conn.finish()
        }
        "die in a chunk" => {
            conn.stream(&[])?;
            conn.chunk(begun)?;
            conn.wire.send(&[b"ffff\r\n", rest].concat())?;
            conn.cut()
        }
        "die in a size" => {
            conn.head(200, &[("content-length", &size.to_string())])?;
            conn.wire.send(begun)?;
            conn.cut()
        }
        "fall silent" => {
            conn.stream(&[])?;
            conn.chunk(begun)?;
            thread::sleep(STALL);
            conn.cut()
        }
        "hang up" => conn.cut(),
        "talk nonsense" => {
            conn.wire.send(b"nonsense, and more of it\r\n\r\n")?;
            conn.cut()
        }
        "stall" => {
            thread::sleep(STALL);
            conn.cut()
        }
        _ => conn.respond(200, &[("x-bearer", req.bearer())], &whole),
    }
}

/// One request, told by its headers what the upstream is to do.
struct Ask {
    what: &'static str,
    target: &'static str,
    seed: u64,
    body: usize,
    size: usize,
}

impl Ask {
    fn headers(&self) -> Vec<(&'static str, String)> {
        vec![
            (BEARER.0, BEARER.1.to_owned()),
            ("x-do", self.what.to_owned()),
            ("x-seed", self.seed.to_string()),
            ("x-body", self.body.to_string()),
            ("x-size", self.size.to_string()),
        ]
    }

    /// Sends it, its body sized or chunked.
    fn send(&self, client: &mut Client, chunked: bool) {
        let headers = self.headers();
        let mut headers: Vec<_> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let body = content(self.seed, self.body);
        if !chunked {
            client.request("POST", self.target, &headers, &body);
            return;
        }
        headers.push(("transfer-encoding", "chunked"));
        client.start("POST", self.target, &headers);
        body.chunks(30_000).for_each(|piece| {
            client.chunk(piece);
        });
        client.finish();
    }

    fn expected(&self) -> Vec<u8> {
        content(self.seed + 1, self.size)
    }
}

/// What a client does.
impl Soak {
    /// A few requests over one connection, then one that ends in some way of its own.
    fn client(&self, seed: u64) {
        let mut random = Random::new(seed ^ self.done_so_far());
        let mut client = self.mux.client();
        for _ in 0..random.below(10) {
            self.good(&mut client, &mut random);
            thread::sleep(REST);
        }
        match random.below(5) {
            0 => self.bad_head(&mut client, &mut random),
            1 => self.broken_upstream(&mut client, &mut random),
            2 => self.departure(client, &mut random),
            3 => self.slow_reader(client, &mut random),
            _ => self.refused(&mut client),
        }
        thread::sleep(REST);
    }

    fn done_so_far(&self) -> u64 {
        lock(&self.done).values().sum::<usize>() as u64
    }

    fn ask(&self, random: &mut Random, what: &'static str, body: usize, size: usize) -> Ask {
        Ask {
            what,
            target: random.pick(&[MESSAGES, RESPONSES]),
            seed: random.below(1 << 30) as u64,
            body: random.below(body),
            size: random.below(size),
        }
    }

    fn good(&self, client: &mut Client, random: &mut Random) {
        let (what, body, size) = match random.below(12) {
            0 => {
                let health = client.request("GET", "/healthz", &[], b"").answer();
                assert_eq!(health.json()["status"], "ok");
                return self.count("health");
            }
            1 => ("a large body", 3 << 20, 1000),
            2 => ("a large answer", 1000, 3 << 20),
            3..=6 => ("stream", 1000, 3000),
            _ => ("a request", 20_000, 20_000),
        };
        let mut ask = self.ask(random, what, body, size);
        if what == "a large body" {
            // A login of the other one is revoked at times, and no large body is sent twice.
            ask.target = MESSAGES;
        }
        ask.send(client, random.below(2) == 0);
        let answer = client.answer();
        assert_eq!(
            answer.status,
            200,
            "{what}: {}",
            String::from_utf8_lossy(&answer.body)
        );
        assert!(answer.body == ask.expected(), "{what}: another answer");
        self.count(what);
    }

    fn bad_head(&self, client: &mut Client, random: &mut Random) {
        const HEADS: [&str; 6] = [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\nhost: x\n\n",
            "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: x\r\nfolded:\r\n line\r\n\r\n",
            "\0\0\0\0",
        ];
        let head = random.pick(&HEADS);
        let answer = client.send(head).answer();
        assert_eq!(answer.status, 400, "{head}");
        answer.error();
        assert!(client.closed());
        self.count("a bad head");
    }

    fn broken_upstream(&self, client: &mut Client, random: &mut Random) {
        let quick = [
            "die in a chunk",
            "die in a size",
            "hang up",
            "talk nonsense",
        ];
        let what = if random.below(10) == 0 {
            random.pick(&["fall silent", "stall"])
        } else {
            random.pick(&quick)
        };
        let mut ask = self.ask(random, what, 1000, 5000);
        ask.size += 10;
        ask.send(client, false);
        let head = client.head();
        let expected = match what {
            "hang up" | "talk nonsense" => "502",
            "stall" => "504",
            _ => "200",
        };
        assert_eq!(head.word(1), expected, "{what}");
        if expected != "200" {
            client.body().expect("a whole error");
            return self.count(what);
        }
        let mut seen = Vec::new();
        let broken = loop {
            match client.piece() {
                Ok(Some(piece)) => seen.extend(piece),
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        assert!(broken, "{what}: the answer seems whole");
        assert!(ask.expected().starts_with(&seen), "{what}: another answer");
        self.count(what);
    }

    /// Goes away in the middle of something.
    fn departure(&self, mut client: Client, random: &mut Random) {
        let ask = self.ask(random, "stream", 1000, 100_000);
        match random.below(3) {
            0 => {
                ask.send(&mut client, false);
                assert_eq!(client.head().word(1), "200");
            }
            1 => {
                let sized = [BEARER, ("content-length", "100000")];
                client.start("POST", MESSAGES, &sized).send("a beginning");
            }
            _ => {
                client.send("POST /claude/v1/messages HTTP/1.1\r\nhost: x\r\nhalf");
            }
        }
        client.wire.cut();
        self.count("a departure");
    }

    /// Lets an answer wait that no buffer on the way can hold, then takes it or goes away.
    fn slow_reader(&self, mut client: Client, random: &mut Random) {
        let mut ask = self.ask(random, "a slow reader", 1000, 3 << 20);
        ask.size += 5 << 20;
        ask.send(&mut client, false);
        assert_eq!(client.head().word(1), "200");
        thread::sleep(Duration::from_millis(300));
        if random.below(2) == 0 {
            let body = client.body().expect("a whole answer");
            assert!(body == ask.expected(), "another answer to a slow reader");
        }
        client.wire.cut();
        self.count(ask.what);
    }

    fn refused(&self, client: &mut Client) {
        let wrong = [("x-api-key", "not-the-token-of-anyone")];
        let answer = client.request("POST", MESSAGES, &wrong, b"{}").answer();
        assert_eq!(answer.status, 401);
        answer.error();
        assert!(client.closed());
        self.count("a wrong token");
    }
}

/// What happens to the login files meanwhile. No other client may notice anything of it.
impl Soak {
    fn owner(&self, seed: u64) {
        let mut random = Random::new(!seed ^ self.done_so_far());
        let provider = random.pick(&["claude", "chatgpt"]);
        let change = [
            Soak::another_login,
            Soak::an_expired_login,
            Soak::a_revoked_login,
            Soak::a_failing_refresh,
            Soak::a_half_written_file,
        ];
        change[random.below(change.len())](self, provider);
        thread::sleep(Duration::from_secs(1));
    }

    fn saved(&self, provider: &str, ttl: i64) -> Login {
        let login = self.up.login(provider, ttl);
        login::save(&self.mux.state(), provider, &login.file(provider));
        login
    }

    /// The access token that the upstream is asked with now.
    fn used(&self, provider: &str) -> String {
        let answer = self.mux.ask("POST", target(provider), &[], b"");
        assert_eq!(answer.status, 200, "{provider}: {}", answer.text());
        answer.header("x-bearer").expect("a token").to_owned()
    }

    fn another_login(&self, provider: &str) {
        let login = self.saved(provider, 3600);
        assert_eq!(self.used(provider), login.access);
        self.count("another login on disk");
    }

    fn an_expired_login(&self, provider: &str) {
        let login = self.saved(provider, -10);
        let used = self.used(provider);
        assert_ne!(used, login.access);
        let file = login::read(&self.mux.state(), provider).to_string();
        assert!(
            file.contains(&used) && !file.contains(&login.refresh),
            "not saved before use"
        );
        self.count("a refresh");
    }

    fn a_revoked_login(&self, _: &str) {
        let login = self.saved("chatgpt", 3600);
        self.up.revoke(&login.access);
        assert_ne!(self.used("chatgpt"), login.access);
        self.count("a revoked login");
    }

    fn a_failing_refresh(&self, provider: &str) {
        self.up
            .on_refresh(|_, conn| conn.respond(500, &[], b"").map(|()| true));
        let login = self.saved(provider, 50);
        assert_eq!(self.used(provider), login.access);
        self.up.refresh_again();
        self.another_login(provider);
        self.count("a failing refresh");
    }

    fn a_half_written_file(&self, provider: &str) {
        let login = self.saved(provider, 3600);
        assert_eq!(self.used(provider), login.access);
        let whole = login.file(provider).to_string();
        let path = login::path(&self.mux.state(), provider);
        fs::write(&path, &whole[..whole.len() / 2]).expect("write half a file");
        assert_eq!(self.used(provider), login.access);
        fs::write(&path, whole).expect("write a file");
        assert_eq!(self.used(provider), login.access);
        self.count("a file rewritten in place");
    }
}
