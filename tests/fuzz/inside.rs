//! The way in: what the tests see of the program's private parts. `src/main.rs` names this file as a module
//! of its own for tests, so it is the only one that knows how the program calls things.
#![allow(dead_code)] // The program's own test build has no use for it.

use super::*;

/// A head as the gate has read it.
pub struct Admitted {
    pub method: String,
    pub target: String,
    /// Those of one name in their order.
    pub kept: Vec<(String, String)>,
    pub length: Length,
    pub expect: bool,
    pub close: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    Empty,
    Sized(u64),
    Chunked,
}

/// Reads the first head of a connection that brings `bytes` and no more: the head and how many bytes it took,
/// none if it is not whole, or the status of the refusal.
pub fn head(bytes: &[u8]) -> Result<Option<(Admitted, usize)>, u16> {
    let mut stream = stream(silent());
    stream.buffered = bytes.to_vec().into();
    let head = match stream.next_head() {
        Ok(head) => head,
        Err(end) if end.status == 0 => panic!("{}", end.message),
        Err(reply) => return Err(reply.status),
    };
    Ok(head.map(|head| {
        let admitted = Admitted {
            method: head.method.clone(),
            target: head.target.clone(),
            kept: head
                .fields
                .iter()
                .map(|(name, value)| (name.to_string(), text(value)))
                .collect(),
            length: match head.body {
                Body { chunked: true, .. } => Length::Chunked,
                _ if !head.fields.contains_key(CONTENT_LENGTH) => Length::Empty,
                Body { left, .. } => Length::Sized(left),
            },
            expect: head.expect && !head.body.is_done(),
            close: !head.keep_alive,
        };
        (admitted, bytes.len() - stream.buffered.len())
    }))
}

/// Reads a body from `source` to its end, at most `room` bytes at a time; an error as the program sees it. What
/// follows a broken body must never be taken for the next request.
pub fn body(length: Length, source: &mut impl Read, room: usize) -> io::Result<Vec<u8>> {
    let mut body = Body::default();
    match length {
        Length::Empty => {}
        Length::Sized(n) => body.left = n,
        Length::Chunked => body.chunked = true,
    }
    let (mut whole, mut piece) = (Vec::new(), vec![0; room]);
    loop {
        match body.read(source, &mut piece) {
            Ok(0) => return Ok(whole),
            Ok(count) => whole.extend_from_slice(&piece[..count]),
            Err(e) => {
                assert!(!body.is_done(), "a broken body counts as read: {e}");
                return Err(e);
            }
        }
    }
}

/// A request whose handler panics, before or after it has sent `sent`: what the client hears, and whether its
/// connection is broken off.
pub fn panic_after(sent: &'static [u8]) -> (Vec<u8>, bool) {
    let (mut client, tcp) = pair();
    let exchange = Exchange::new(stream(tcp), Head::default(), Duration::ZERO);
    let verdict = fence(exchange, |exchange| {
        if !sent.is_empty() {
            exchange.report.status = 200;
            exchange.stream.write_piece(sent).expect("send");
        }
        panic!("a handler's fault")
    });
    let broken = verdict.is_none();
    drop(verdict);
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).expect("read to the end");
    (heard, broken)
}

fn stream(tcp: TcpStream) -> Stream {
    tcp.set_nonblocking(true).expect("set nonblocking");
    Stream::new(tcp, SocketAddr::from(([127, 0, 0, 1], 0)), None)
}

fn text(value: &HeaderValue) -> String {
    value.to_str().expect("ASCII").to_owned()
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connect");
    (client, listener.accept().expect("accept").0)
}

/// A socket whose other end sends nothing.
fn silent() -> TcpStream {
    static ENDS: std::sync::OnceLock<(TcpStream, TcpStream)> = std::sync::OnceLock::new();
    ENDS.get_or_init(pair).1.try_clone().expect("a descriptor")
}
