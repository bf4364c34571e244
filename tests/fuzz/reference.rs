//! A second reading of RFC 9112, written apart from the program's and in another manner: whole buffers, split
//! at line ends. It is as strict as the program means to be, so the two must agree on everything.

use super::inside::Length;

/// What the program's limits are meant to be: the text of a line of a head, a line between chunks with its end,
/// a head as a whole, and its fields.
const LINE: usize = (8 << 10) - 1;
const CHUNK_LINE: usize = 8 << 10;
const HEAD: usize = 32 << 10;
const FIELDS: usize = 100;

#[derive(Debug, PartialEq)]
pub enum Reading<T> {
    Whole(T),
    Refused,
    /// Right so far, but not all of it is there.
    Short,
}

use Reading::{Refused, Short, Whole};

#[derive(Debug, PartialEq)]
pub struct Head {
    pub method: String,
    pub target: String,
    pub old: bool,
    /// All of them, in order, without the white space around values.
    pub fields: Vec<(String, String)>,
    pub length: Length,
    /// Where the body begins.
    pub end: usize,
}

impl Head {
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self
            .fields
            .iter()
            .filter(move |(n, _)| n.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str())
    }
}

/// Reads the head at the start of `bytes`.
pub fn head(bytes: &[u8]) -> Reading<Head> {
    // One empty line before it is nothing.
    let skipped = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let bytes = &bytes[skipped..];
    let found = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let end = found.map_or(bytes.len(), |at| at + 4);
    let (mut line, mut begins) = (0, 0);
    for (at, byte) in bytes[..end].iter().enumerate() {
        let before = at.checked_sub(1).map(|before| bytes[before]);
        let fine = match byte {
            b'\n' => before == Some(b'\r'),
            b'\t' | b' '..=b'~' | b'\r' => before != Some(b'\r'),
            _ => false,
        };
        line = at + 1 - begins;
        let text = !matches!(byte, b'\r' | b'\n');
        if !fine || text && line > LINE || at + 1 > HEAD {
            return Refused;
        }
        if *byte == b'\n' {
            if line == 2 && at + 1 != end {
                return Refused; // an empty line, and no request line before it
            }
            begins = at + 1;
        }
    }
    if found.is_none() {
        // An empty line where the request line should be is all that there is.
        return if line == 2 && bytes == b"\r\n" {
            Refused
        } else {
            Short
        };
    }
    let text = std::str::from_utf8(&bytes[..end - 4]).expect("plain ASCII");
    match lines(text.split("\r\n").collect()) {
        Some(head) => Whole(Head {
            end: end + skipped,
            ..head
        }),
        None => Refused,
    }
}

fn lines(lines: Vec<&str>) -> Option<Head> {
    let words: Vec<_> = lines[0].split(' ').collect();
    let [method, target, version] = words[..] else {
        return None;
    };
    let capitals = method.bytes().all(|b| b == b'-' || b.is_ascii_uppercase());
    if !capitals
        || !(1..16).contains(&method.len())
        || ["TRACE", "TRACK", "CONNECT"].contains(&method)
    {
        return None;
    }
    if !target.starts_with('/') || target.contains(['\t', '"', '#', '<', '>']) {
        return None;
    }
    let old = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        _ => return None,
    };
    if lines.len() - 1 > FIELDS {
        return None;
    }
    let fields = lines[1..].iter().map(|line| field(line));
    let fields = fields.collect::<Option<Vec<_>>>()?;
    let mut head = Head {
        method: method.to_owned(),
        target: target.to_owned(),
        old,
        fields,
        length: Length::Empty,
        end: 0,
    };
    head.length = length(&head)?;
    let body = !matches!(head.length, Length::Empty | Length::Sized(0));
    let impossible = body && method == "HEAD" || old && head.length == Length::Chunked;
    let hosts: Vec<_> = head.all("host").collect();
    let host = match hosts[..] {
        [] => old,
        [host] => host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._~:[]%".contains(c)),
        _ => false,
    };
    (host && !impossible).then_some(head)
}

/// One field line; nothing that is folded, and no white space before the colon.
fn field(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once(':')?;
    let value = value.trim_matches([' ', '\t']);
    is_token(name).then(|| (name.to_owned(), value.to_owned()))
}

fn is_token(text: &str) -> bool {
    let special = |c| "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || special(c))
}

/// None where it is said twice, in two ways, or not as a number.
fn length(head: &Head) -> Option<Length> {
    let sizes: Vec<_> = head.all("content-length").collect();
    let codings: Vec<_> = head.all("transfer-encoding").collect();
    match (&sizes[..], &codings[..]) {
        ([], []) => Some(Length::Empty),
        ([], [coding]) => coding
            .eq_ignore_ascii_case("chunked")
            .then_some(Length::Chunked),
        ([size], []) => {
            let digits = !size.is_empty() && size.bytes().all(|b| b.is_ascii_digit());
            // What no number holds is too large in any case.
            digits.then(|| Length::Sized(size.parse().unwrap_or(u64::MAX)))
        }
        _ => None,
    }
}

#[derive(Debug, Default, PartialEq)]
pub struct Body {
    pub content: Vec<u8>,
    /// How many lines stood behind the last chunk.
    pub trailers: usize,
    pub end: usize,
}

/// Decodes the body at the start of `bytes`.
pub fn body(length: Length, bytes: &[u8]) -> Reading<Body> {
    let sized = |size| usize::try_from(size).ok().and_then(|n| bytes.get(..n));
    match length {
        Length::Empty => Whole(Body::default()),
        Length::Sized(size) => sized(size).map_or(Short, |content| {
            Whole(Body {
                content: content.to_vec(),
                trailers: 0,
                end: content.len(),
            })
        }),
        Length::Chunked => chunks(bytes),
    }
}

fn chunks(bytes: &[u8]) -> Reading<Body> {
    let (mut content, mut at) = (Vec::new(), 0);
    loop {
        let line = match chunk_line(&bytes[at..]) {
            Whole(line) => line,
            Refused => return Refused,
            Short => return Short,
        };
        at += line.len() + 2;
        let digits = line.split(';').next().expect("a first part");
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Refused;
        }
        let digits = digits.trim_start_matches('0');
        if digits.is_empty() {
            break;
        }
        if digits.len() > 16 {
            return Refused;
        }
        let size = digits.chars().fold(0u64, |size, digit| {
            size << 4 | u64::from(digit.to_digit(16).expect("a digit"))
        });
        let left = &bytes[at..];
        let Some(chunk) = usize::try_from(size).ok().and_then(|n| left.get(..n)) else {
            return Short;
        };
        content.extend_from_slice(chunk);
        at += chunk.len();
        match chunk_line(&bytes[at..]) {
            Whole("") => at += 2,
            Whole(_) | Refused => return Refused,
            Short => return Short,
        }
    }
    for trailers in 0..=FIELDS {
        match chunk_line(&bytes[at..]) {
            Whole("") => {
                return Whole(Body {
                    content,
                    trailers,
                    end: at + 2,
                });
            }
            Whole(line) => at += line.len() + 2,
            Refused => return Refused,
            Short => return Short,
        }
    }
    Refused
}

fn chunk_line(bytes: &[u8]) -> Reading<&str> {
    let most = &bytes[..bytes.len().min(CHUNK_LINE)];
    let end = most.iter().position(|b| *b == b'\n');
    let line = match (end, most.len()) {
        (Some(end), _) => &most[..end],
        (None, CHUNK_LINE) => return Refused,
        (None, _) => return Short,
    };
    let plain = |b: &u8| matches!(b, b'\t' | b' '..=b'~');
    match line.split_last() {
        Some((b'\r', line)) if line.iter().all(plain) => {
            Whole(std::str::from_utf8(line).expect("plain ASCII"))
        }
        _ => Refused,
    }
}
