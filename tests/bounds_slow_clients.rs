//! A client that is too slow is let go in time, whatever it is slow at, and one that is merely slow is not.
//! The limits are real, 10 s and 30 s, so all families run at the same time, each against a process of
//! its own.

mod common;
use common::*;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// As long as the slowest limit and what a loaded machine adds.
const LONG: Duration = Duration::from_secs(60);

type Family = fn(&Mux, &Upstream);

const FAMILIES: [(&str, Family); 12] = [
    ("heads that stay half", half_sent_heads),
    ("heads that drip", dripped_heads),
    (
        "heads that stay half behind a whole one",
        half_sent_behind_a_whole_one,
    ),
    ("bodies that never come", bodies_that_never_come),
    ("bodies that stop half way", half_sent_bodies),
    ("bodies that drip", dripped_bodies),
    ("chunks that drip", dripped_chunks),
    ("answers that nobody reads", |mux, up| {
        never_readers(mux, up, 64)
    }),
    ("a head that is slow, but not too slow", slow_head),
    ("a body that is slow, but not too slow", slow_body),
    ("a reader that is slow, but not too slow", slow_reader),
    ("a reader that is slow, but never pauses", steady_reader),
];

/// What is encrypted already may still wait for room. They have four workers only, since what all
/// sockets of a machine may hold together has a limit, beyond which the kernel slows each.
const OVER_TLS: [(&str, Family); 2] = [
    ("answers over TLS that nobody reads", |mux, up| {
        never_readers(mux, up, 4)
    }),
    ("a reader over TLS that is slow", slow_reader),
];

/// An empty line behind a body is nothing, and no head that has begun.
#[test]
fn an_empty_line_behind_a_body_leaves_the_connection_its_time() {
    let up = Upstream::plain();
    let authority = Authority::new();
    let plain = Mux::start(&up);
    let secure = Setup::new(&up).tls(&authority).start();
    let mut clients = [plain.client(), Client::tls(secure.addr, &authority)];
    for client in &mut clients {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
        assert_eq!(client.answer().status, 200);
        client.send("\r\n");
    }
    thread::sleep(Duration::from_secs(12)); // a head has 10
    for client in &mut clients {
        let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
        assert_eq!(answer.status, 200);
    }
}

/// The clock is a request of 15 s: a head and a body, which have 10, have been let go when it ends.
#[test]
fn a_head_and_a_body_are_let_go_before_a_longer_wait_is_over() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.cut()
    });
    let mux = Setup::new(&up).set("request_timeout", "15s").start();
    let (mut head, mut body, mut clock) = (mux.client(), mux.client(), mux.client());
    head.send("GET / HT");
    body.start("POST", MESSAGES, &[BEARER, ("content-length", "10")]);
    clock.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(clock.answer().status, 504);
    end.advance();
    assert_eq!(mux.log_lines("status=408").len(), 2, "{}", mux.log());
}

/// Upstream, too, has its time, unless the configuration says less: a minute for its head, and five
/// for a silence behind that. Here it takes what most would call too long.
#[test]
fn by_default_an_upstream_may_be_slow() {
    let pause = || thread::sleep(Duration::from_secs(40));
    let up = Upstream::start(move |req, conn| {
        if req.head.get("x-late").is_some() {
            pause();
            return conn.respond(200, &[], b"late");
        }
        conn.stream(&[])?;
        conn.chunk("one")?;
        pause();
        conn.chunk("two")?;
        conn.finish()
    });
    let mux = Mux::start(&up);
    let [late, halting] = &mut clients(&mux, 2)[..] else {
        unreachable!("two of them");
    };
    // Nor is a connection let go meanwhile on which nothing is asked.
    let mut idle = mux.client();
    let mut health = move || idle.request("GET", "/healthz", &[], b"").answer().status;
    assert_eq!(health(), 200);
    late.request("POST", MESSAGES, &[BEARER, ("x-late", "1")], b"{}");
    halting.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(halting.answer().text(), "onetwo");
    assert_eq!(late.answer().text(), "late");
    assert_eq!(health(), 200);
}

#[test]
fn each_is_let_go_in_time() {
    need_descriptors(4096);
    let authority = Authority::new();
    let plain = FAMILIES.map(|(name, family)| (name, family, None));
    let secure = OVER_TLS.map(|(name, family)| (name, family, Some(&authority)));
    at_once(plain.into_iter().chain(secure), |(name, family, tls)| {
        let up = Upstream::at_head(answer);
        let setup = Setup::new(&up).set("request_timeout", "50s");
        let (setup, workers) = match tls {
            Some(authority) => (setup.tls(authority), 4),
            None => (setup, 64),
        };
        let mux = setup.set("workers", workers).start();
        let before = mux.warm_footprint();
        let began = Instant::now();
        family(&mux, &up);
        mux.assert_recovered(before, workers);
        eprintln!("{name}: {:?}", began.elapsed());
    });
}

/// Echoes the size of a body, or streams without an end to whoever asks for that.
fn answer(req: &Request, conn: &mut Conn) -> io::Result<()> {
    let body = conn.wire.body(req.head.framing(http::Framing::Done))?;
    let Some(size) = req.head.get("x-stream") else {
        return conn.respond(200, &[], body.len().to_string().as_bytes());
    };
    // Megabytes of it wait in ai-mux's own sockets: with as many here for each, the kernel may run
    // short.
    set_socket_send_buffer_size(conn.wire.socket(), 128 << 10)?;
    conn.stream(&[])?;
    for _ in 0..size.parse().expect("a number of pieces") {
        conn.chunk([b'x'; 16 << 10])?;
    }
    conn.finish()
}

fn clients(mux: &Mux, count: usize) -> Vec<Client> {
    let clients: Vec<_> = (0..count).map(|_| mux.caller()).collect();
    for client in &clients {
        let socket = client.wire.socket();
        socket.set_read_timeout(Some(LONG)).expect("set a timeout");
    }
    clients
}

/// Sends a piece of `text` every half second to all of them, until all are let go: nothing can be sent any more.
fn drip(clients: &mut [Client], text: &[u8], size: usize) {
    for piece in text.chunks(size).cycle().take(100) {
        let sent = clients.iter_mut().filter_map(|c| c.wire.send(piece).ok());
        if sent.count() == 0 {
            return;
        }
        thread::sleep(Duration::from_millis(500));
    }
    panic!("some are let drip for ever");
}

/// Nobody has been let go yet, so whoever is served now is served beside them all.
fn assert_served_beside(mux: &Mux, clients: &[Client]) {
    assert_eq!(mux.message().status, 200);
    for client in clients {
        let socket = client.wire.socket();
        socket.set_nonblocking(true).expect("set nonblocking");
        let peeked = socket.peek(&mut [0]).map_err(|e| e.kind());
        socket.set_nonblocking(false).expect("set blocking");
        assert_eq!(peeked, Err(io::ErrorKind::WouldBlock));
    }
}

fn assert_408(clients: &mut [Client]) {
    for client in clients {
        let answer = client.answer();
        assert_eq!(answer.status, 408);
        assert_eq!(answer.header("x-should-retry"), None);
        let said = answer.error();
        assert!(said.contains("came too slowly; send it"), "{said}");
        assert!(client.closed());
    }
}

fn half_sent_heads(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 300);
    for (number, client) in clients.iter_mut().enumerate() {
        let head = b"POST /claude/v1/messages HTTP/1.1\r\nhost: ai-mux\r\nx-name: value\r\n";
        client.send(&head[..1 + number % (head.len() - 1)]);
    }
    assert_served_beside(mux, &clients);
    assert_408(&mut clients);
}

fn half_sent_behind_a_whole_one(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 64);
    for client in &mut clients {
        client
            .request("GET", "/healthz", &[], b"")
            .send("GET /healthz HTTP/1.1\r\nho");
        assert_eq!(client.answer().status, 200);
    }
    assert_served_beside(mux, &clients);
    assert_408(&mut clients);
}

fn dripped_heads(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 64);
    for client in &mut clients {
        client.send("GET /claude/v1/messages HTTP/1.1\r\n");
    }
    assert_served_beside(mux, &clients);
    drip(&mut clients, b"x", 1);
}

fn bodies_that_never_come(mux: &Mux, up: &Upstream) {
    let mut clients = clients(mux, 63);
    for (number, client) in clients.iter_mut().enumerate() {
        let length = ["10", "1000000", "60000000"][number % 3];
        client.start("POST", MESSAGES, &[BEARER, ("content-length", length)]);
    }
    assert_served_beside(mux, &clients);
    assert_408(&mut clients);
    // Of the large ones, upstream has heard the head; but of none a whole request.
    assert!(up.requests().len() <= 2 + 21);
}

/// What came fast is no credit for a silence of minutes: a laptop that was closed holds no worker so long.
fn half_sent_bodies(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 8);
    for (number, client) in clients.iter_mut().enumerate() {
        let length = ["900000", "9000000"][number % 2];
        client.start("POST", MESSAGES, &[BEARER, ("content-length", length)]);
        client.send([b'x'; 100_000]);
    }
    assert_served_beside(mux, &clients);
    assert_408(&mut clients);
}

/// They hold every worker there is, and lose them all.
fn dripped_bodies(mux: &Mux, up: &Upstream) {
    let mut clients = clients(mux, 64);
    for client in &mut clients {
        client.start("POST", MESSAGES, &[BEARER, ("content-length", "100000")]);
    }
    drip(&mut clients, &[b'x'; 256], 256); // half of what would do
    mux.wait_log_times("status=408", 64);
    assert_eq!(mux.log_lines("status=408").len(), 64);
    assert_eq!(up.requests().len(), 1);
}

/// What frames a body is no body: it earns no time.
fn dripped_chunks(mux: &Mux, up: &Upstream) {
    let mut clients = clients(mux, 64);
    let headers = [BEARER, ("transfer-encoding", "chunked")];
    for client in &mut clients {
        client.start("POST", MESSAGES, &headers);
    }
    drip(&mut clients, b"1\r\nx\r\n", 1);
    mux.wait_log_times("status=408", 64);
    assert_eq!(mux.log_lines("status=408").len(), 64);
    assert_eq!(up.requests().len(), 1);
}

/// They too hold every worker, until a piece was not taken for 30 s.
fn never_readers(mux: &Mux, up: &Upstream, count: usize) {
    let before = mux.footprint();
    let mut clients = clients(mux, count);
    for client in &mut clients {
        // A small buffer is full soon, and leaves the slow ones beside them their room.
        let socket = client.wire.socket();
        set_socket_recv_buffer_size(socket, 4096).expect("set a buffer's size");
        let headers = [BEARER, ("x-stream", "1000000")];
        client.request("POST", MESSAGES, &headers, b"");
    }
    up.wait(1 + count, |_| true);
    mux.assert_settled(before, 2 * count);
    assert!(
        mux.log_lines("ended=").is_empty(),
        "only as they are let go"
    );
    let answer = mux.caller().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(answer.status, 200);
    // One that waits for a worker gets one of theirs, before its own time of 50 s is over.
    let waiting = &mut self::clients(mux, 1)[0];
    waiting.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(waiting.answer().status, 200);
    let last = Instant::now() + LONG;
    while mux.log_lines("ended=").len() < count {
        assert!(Instant::now() < last, "they hold their workers for ever");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Over 5 s, of the 10 that there are from its first byte on.
fn slow_head(mux: &Mux, _: &Upstream) {
    let head = format!("GET {MESSAGES} HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\n\r\n");
    let mut clients = clients(mux, 4);
    for piece in head.as_bytes().chunks(head.len().div_ceil(6)) {
        for client in &mut clients {
            client.send(piece);
        }
        thread::sleep(Duration::from_secs(1));
    }
    for client in &mut clients {
        assert_eq!(client.answer().status, 200);
    }
}

/// After a silence of 5 s, of the 10 that are free: 14 s, at 1.5 KiB a second, which is more than the least.
fn slow_body(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 4);
    for client in &mut clients {
        client.start("POST", MESSAGES, &[BEARER, ("content-length", "21504")]);
    }
    thread::sleep(Duration::from_secs(5));
    for _ in 0..28 {
        for client in &mut clients {
            client.send([b'x'; 768]);
        }
        thread::sleep(Duration::from_millis(500));
    }
    for client in &mut clients {
        assert_eq!(client.answer().text(), "21504");
    }
}

/// Takes nothing for 15 s, twice, and gets everything.
fn slow_reader(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 4);
    for client in &mut clients {
        let headers = [BEARER, ("x-stream", "2000")];
        client.request("POST", MESSAGES, &headers, b"").head();
    }
    let mut taken = [0; 4];
    for round in 1..=2 {
        thread::sleep(Duration::from_secs(15));
        for (client, taken) in clients.iter_mut().zip(&mut taken) {
            while *taken < round * (8 << 20) {
                *taken += client.text().len();
            }
        }
    }
    for (client, taken) in clients.iter_mut().zip(taken) {
        let rest = client.body().expect("a whole body").len();
        assert_eq!(taken + rest, 2000 * (16 << 10));
    }
}

/// A piece every half second, for longer than a piece may take. The kernel tells of room for the next only once a
/// third of a buffer of megabytes is free, which takes longer than that.
fn steady_reader(mux: &Mux, _: &Upstream) {
    let mut clients = clients(mux, 2);
    for client in &mut clients {
        let headers = [BEARER, ("x-stream", "1000")];
        client.request("POST", MESSAGES, &headers, b"").head();
    }
    let mut taken = [0; 2];
    for _ in 0..80 {
        thread::sleep(Duration::from_millis(500));
        for (client, taken) in clients.iter_mut().zip(&mut taken) {
            *taken += client.text().len();
        }
    }
    for (client, taken) in clients.iter_mut().zip(taken) {
        let rest = client.body().expect("a whole body").len();
        assert_eq!(taken + rest, 1000 * (16 << 10));
    }
}
