//! There is one reading of a request: whatever the gate lets through, tiny_http and a second, strict reading of
//! RFC 9112 understand in the same way, and all agree on where it ends. Tried with requests made up at random
//! from a seed, for `FUZZ_SECONDS` (3) each, from `FUZZ_SEED` (1) on; a failure names the seed and the input.

#[path = "fuzz/check.rs"]
mod check;
mod common;
#[path = "fuzz/generate.rs"]
mod generate;
#[allow(dead_code)] // its main
#[path = "../src/main.rs"]
mod program;
#[path = "fuzz/random.rs"]
mod random;
#[path = "fuzz/reference.rs"]
mod reference;
#[path = "fuzz/tiny.rs"]
mod tiny;

use check::{Gate, Tally};
use program::inside::{self, Length};
use random::Random;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use tiny::Tiny;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Tries inputs until the time is over; the first that fails, and why.
fn search(
    time: Duration,
    make: impl Fn(&mut Random) -> Vec<u8>,
    mut check: impl FnMut(&[u8], usize) -> Result<(), String>,
) -> Result<u64, String> {
    let (first, end) = (number("FUZZ_SEED", 1), Instant::now() + time);
    let mut seed = first;
    while Instant::now() < end {
        let mut random = Random::new(seed);
        let bytes = make(&mut random);
        let step = [1, 2, 3, 5, 64, 4096][random.below(6)];
        let outcome = catch_unwind(AssertUnwindSafe(|| check(&bytes, step)));
        let outcome = outcome.unwrap_or_else(|_| Err("a panic".to_owned()));
        let report = |why| format!("seed {seed}: {why}\nof b\"{}\"", bytes.escape_ascii());
        outcome.map_err(report)?;
        seed += 1;
    }
    Ok(seed - first)
}

fn time() -> Duration {
    Duration::from_secs(number("FUZZ_SECONDS", 3))
}

fn corpus() -> Vec<&'static [u8]> {
    CASES.iter().map(|(bytes, _)| *bytes).collect()
}

#[test]
fn every_head_is_read_in_one_way() {
    let (tiny, mut tally) = (Tiny::start(), Tally::default());
    let check =
        |bytes: &[u8], step| check::connection(&inside::head, &tiny, bytes, step, &mut tally);
    let corpus = corpus();
    let tried = search(
        time(),
        |random| generate::connection(random, &corpus),
        check,
    );
    let tried = tried.unwrap_or_else(|found| panic!("{found}"));
    println!("{tried} connections: {tally:?}");
    let Tally { raw, refused, .. } = tally;
    let share = tried as usize / 10;
    assert!(raw > share && refused > share, "too few of each: {tally:?}");
}

#[test]
fn every_chunked_body_is_read_in_one_way() {
    let mut tally = Tally::default();
    let make = |random: &mut Random| {
        let chunks = generate::chunks(random);
        generate::mutated(random, chunks)
    };
    let check =
        |bytes: &[u8], step| check::same_body(Length::Chunked, bytes, step, &mut tally).map(drop);
    let tried = search(time(), make, check).unwrap_or_else(|found| panic!("{found}"));
    println!("{tried} bodies: {tally:?}");
    let Tally { whole, broken, .. } = tally;
    let share = tried as usize / 10;
    assert!(
        whole > share && broken > share,
        "too few of each: {tally:?}"
    );
}

/// A gate that is lenient in one way, as a mistake in it would be.
fn lenient(find: &'static [u8], put: &'static [u8]) -> Box<Gate> {
    Box::new(move |bytes| {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let end = end.map_or(bytes.len(), |at| at + 4);
        let lower = bytes[..end].to_ascii_lowercase();
        let found = lower.windows(find.len()).rposition(|part| part == find);
        let Some(at) = found.filter(|_| inside::head(bytes).is_err()) else {
            return inside::head(bytes);
        };
        let mended = [&bytes[..at], put, &bytes[at + find.len()..]].concat();
        let head = inside::head(&mended)?;
        Ok(head.map(|(head, end)| (head, end + find.len() - put.len())))
    })
}

#[test]
fn a_gate_that_is_too_lenient_is_found_out() {
    let planted: [(&str, Box<Gate>); 4] = [
        (
            "content-length twice",
            lenient(b"\r\ncontent-length: 5", b""),
        ),
        (
            "chunked with a length",
            lenient(b"\r\ntransfer-encoding: chunked", b""),
        ),
        ("a folded line", lenient(b"\r\n ", b"   ")),
        ("a control character", lenient(b"\0", b"x")),
    ];
    for (name, gate) in planted {
        let (tiny, mut tally) = (Tiny::start(), Tally::default());
        let check = |bytes: &[u8], step| check::connection(&*gate, &tiny, bytes, step, &mut tally);
        let corpus = corpus();
        let patience = Duration::from_secs(60);
        let found = search(
            patience,
            |random| generate::connection(random, &corpus),
            check,
        );
        assert!(found.is_err(), "{name} was not found in {patience:?}");
    }
}

type Case = (&'static [u8], Result<&'static [u8], u16>);

/// What was told apart by a search with a mistake planted in the program, or is told apart by other servers:
/// the content of the body, or the status of the refusal.
const CASES: [Case; 44] = [
    (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", Ok(b"")),
    (b"\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n", Ok(b"")),
    (b"GET / HTTP/1.0\r\n\r\n", Ok(b"")),
    (b"HEAD / HTTP/1.1\r\nhost:\r\ncontent-length: 0\r\n\r\n", Ok(b"")),
    (b"POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 005\r\n\r\nhello", Ok(b"hello")),
    (b"POST / HTTP/1.1\r\nhost: x\r\nconnection: keep-alive, close\r\ncontent-length: 1\r\n\r\nx", Ok(b"x")),
    (b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx", Ok(b"x")),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: Chunked\r\n\r\n5;a=\"b;c\"\r\nhello\r\n0005\r\nhello\r\n00\r\n\r\n", Ok(b"hellohello")),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\ncontent-length: 5\r\n\r\n", Ok(b"0123456789")),
    (b"GET / HTTP/1.1\r\nhost: x\r\na!#$%&'*+-.^_`|~9: \t a  b \r\nempty:\r\n\r\n", Ok(b"")),
    // Line ends.
    (b"GET / HTTP/1.1\nhost: x\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\n\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\na: b\rc: d\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c: d\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\n host: x\r\nhost: x\r\n\r\n", Err(400)),
    (b"\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"\nGET / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    // The request line and the fields.
    (b"SIXTEEN-CAPITALS / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET  / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1 \r\nhost: x\r\n\r\n", Err(400)),
    (b" GET / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET\t/ HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\na : b\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\n: b\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\na: \0\r\n\r\n", Err(400)),
    (b"GET / HTTP/1.1\r\nhost: x\r\na: \xc2\xa0\r\n\r\n", Err(400)),
    // The length.
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: 5\r\n\r\nhello", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\nhello", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5, 5\r\n\r\nhello", Err(400)),
    (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", Err(400)),
    // The chunks.
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n", Err(400)),
    // The trailers: what follows a broken one must not be taken for a request.
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\nGET / HTTP/1.1\r\nhost: x\r\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: b\n\r\n", Err(400)),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: \0\r\n\r\n", Err(400)),
];

#[test]
fn known_traps_are_read_in_one_way() {
    let tiny = Tiny::start();
    for (bytes, should) in CASES {
        let shown = bytes.escape_ascii();
        let found = inside::head(bytes).and_then(|head| {
            let (head, end) = head.unwrap_or_else(|| panic!("not whole: {shown}"));
            let mut rest = &bytes[end..];
            let body = inside::body(head.length, &mut rest, 64).map_err(|_| 400u16)?;
            assert!(rest.is_empty(), "it ends elsewhere: {shown}");
            Ok(body)
        });
        assert_eq!(
            found.as_deref().map_err(|status| *status),
            should,
            "{shown}"
        );
        check::connection(&inside::head, &tiny, bytes, 1, &mut Tally::default())
            .unwrap_or_else(|why| panic!("{why}: {shown}"));
    }
}

#[test]
fn a_panic_is_a_500_before_the_head_and_a_broken_answer_after() {
    let (heard, broken) = inside::panic_after(b"");
    let heard = String::from_utf8(heard).expect("text");
    assert!(heard.starts_with("HTTP/1.1 500 "), "{heard}");
    assert!(heard.contains("\"type\":\"error\"") && !broken, "{heard}");
    assert!(!heard.contains("x-should-retry"), "{heard}");

    const BEGUN: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let (heard, broken) = inside::panic_after(BEGUN);
    assert_eq!(
        heard, BEGUN,
        "nothing may follow, least of all a final chunk"
    );
    assert!(broken);
}
