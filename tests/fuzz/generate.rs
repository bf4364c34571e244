//! Requests to try: mostly right, sometimes wrong in one place on purpose, sometimes at random.

use crate::random::Random;

const METHODS: [&str; 12] = [
    "GET", "POST", "PUT", "HEAD", "PATCH", "DELETE", "OPTIONS", "M-SEARCH", "TRACE", "CONNECT",
    "post", "PO ST",
];
const TARGETS: [&str; 12] = [
    "/",
    "/claude/v1/messages",
    "/chatgpt/v1/responses?stream=true&x=%41",
    "/~a.b-c_d:@!$&'()*+,;=[]{}|^`\\",
    "*",
    "http://host/claude/v1/messages",
    "/a#b",
    "/a b",
    "",
    "//x//y",
    "/\"quoted\"",
    "/x?a=<b>",
];
const VERSIONS: [&str; 8] = [
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/1.2",
    "HTTP/1.10",
    "http/1.1",
    "HTTP/1.1 ",
    "",
];
const NAMES: [&str; 20] = [
    "accept",
    "Authorization",
    "x-api-key",
    "User-Agent",
    "connection",
    "expect",
    "upgrade",
    "te",
    "trailer",
    "x!#$%&'*+-.^_`|~9",
    "x-ticket",
    "Content-Type",
    "host",
    "content-length",
    "transfer-encoding",
    "content_length",
    "x y",
    "x ",
    "",
    " x",
];
const VALUES: [&str; 20] = [
    "",
    "a",
    "a, b",
    "\ta \t b\t",
    ": : :",
    "close",
    "Close, x-secret",
    "keep-alive",
    "upgrade",
    "100-continue",
    "websocket",
    "chunked",
    "Chunked",
    "gzip, chunked",
    "chunked, chunked",
    "5",
    "+5",
    "5, 5",
    "host:80",
    "h\u{e9}",
];
const SIZES: [&str; 10] = [
    "0x5",
    "-1",
    "+3",
    "5 5",
    "3,3",
    "",
    "1e1",
    "\u{b2}",
    "18446744073709551616",
    "99999999999999",
];
/// What mutations put in.
const PIECES: [&[u8]; 24] = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\n\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b"0",
    b"\x0b",
    b"\x7f",
    b"\x80",
    b"\xc2\xa0",
    b"HTTP/1.1",
    b"\r\n ",
    b"Content-Length: 5\r\n",
    b"content-length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"0\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"connection: upgrade\r\n",
];

/// The bytes of a connection: one request or a few.
pub fn connection(random: &mut Random, corpus: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::new();
    if random.once_in(20) {
        all.extend_from_slice(b"\r\n");
    }
    loop {
        if random.once_in(5) {
            all.extend_from_slice(random.pick(corpus));
        } else {
            all.extend(request(random));
        }
        if !random.once_in(4) {
            break;
        }
    }
    mutated(random, all)
}

/// Leaves half of them as they are.
pub fn mutated(random: &mut Random, mut bytes: Vec<u8>) -> Vec<u8> {
    if random.once_in(2) {
        return bytes;
    }
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() + 1);
        let to = at + random.below((bytes.len() - at).min(16) + 1);
        match random.below(5) {
            0 => drop(bytes.splice(at..at, random.pick(&PIECES).iter().copied())),
            1 => drop(bytes.splice(at..to, random.pick(&PIECES).iter().copied())),
            2 => drop(bytes.drain(at..to)),
            3 => {
                let copy = bytes[at..to].to_vec();
                let into = random.below(bytes.len() + 1);
                bytes.splice(into..into, copy);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.below(256) as u8;
                }
            }
        }
    }
    bytes
}

fn request(random: &mut Random) -> Vec<u8> {
    let method = random.usual(&METHODS, 8, 30);
    let target = random.usual(&TARGETS, 4, 30);
    let version = random.usual(&VERSIONS, 2, 30);
    let mut lines = vec![format!("{method} {target} {version}")];
    if version != "HTTP/1.0" || random.once_in(2) {
        lines.push("Host: ai-mux".to_owned());
    }
    for _ in 0..random.below(6) {
        let name = random.usual(&NAMES, 10, 30);
        let value = random.usual(&VALUES, 12, 30);
        let space = random.pick(&["", " ", "  ", "\t"]);
        lines.push(format!("{name}:{space}{value}{}", random.pick(&["", " "])));
    }
    if random.once_in(300) {
        lines.extend((0..98 + random.below(5)).map(|n| format!("x-{n}: {n}")));
    }
    if random.once_in(300) {
        let long = 8180 + random.below(20);
        lines.extend((0..=random.below(5)).map(|_| format!("x: {}", "l".repeat(long))));
    }
    let mut body = Vec::new();
    match random.below(4) {
        0 | 1 if method != "HEAD" || random.once_in(20) => {
            body = random.bytes(40);
            let size = match random.once_in(10) {
                true => random.pick(&SIZES).to_owned(),
                false => format!("{}{}", random.pick(&["", "", "00"]), body.len()),
            };
            lines.push(format!("Content-Length: {size}"));
        }
        2 if method != "HEAD" && version != "HTTP/1.0" || random.once_in(20) => {
            body = chunks(random);
            lines.push("Transfer-Encoding: chunked".to_owned());
        }
        _ => {}
    }
    if random.once_in(30) {
        let copy = lines[random.below(lines.len())].clone();
        lines.push(copy);
    }
    let swapped = 1 + random.below(lines.len());
    if swapped < lines.len() {
        lines[1..].swap(0, swapped - 1);
    }
    let mut bytes = Vec::new();
    for line in lines.iter().map(String::as_str).chain([""]) {
        bytes.extend_from_slice(line.as_bytes());
        let odd = random.once_in(200);
        let end: &[u8] = if odd { random.pick(&PIECES) } else { b"\r\n" };
        bytes.extend_from_slice(end);
    }
    bytes.extend(body);
    bytes
}

/// A body in chunks, with everything that RFC 9112 allows there, and a little that it does not.
pub fn chunks(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    let ends: [&[u8]; 9] = [
        b"\r\n",
        b"\r\n",
        b"\r\n",
        b"\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"",
        b"\r\n\r\n",
    ];
    let extensions = [
        "",
        "",
        "",
        ";a",
        ";a=b",
        ";a=\"b;c\"",
        " ;a",
        "; a",
        ";\u{e9}",
        " ",
        "\t",
        ";",
    ];
    for _ in 0..random.below(5) {
        let most = if random.once_in(20) { 5000 } else { 30 };
        let data = random.bytes(most);
        if data.is_empty() {
            continue;
        }
        let size = match random.below(60) {
            0 => "ffffffffffffffff".to_owned(),
            1 => "10000000000000000".to_owned(),
            2 => format!("0x{:x}", data.len()),
            3 => format!("+{:x}", data.len()),
            4 => String::new(),
            5 => format!("{:x}", data.len() + 1),
            6 => format!("{:x}", data.len() - 1),
            7..20 => format!("{:X}", data.len()),
            20..30 => format!("{:024x}", data.len()),
            _ => format!("{:x}", data.len()),
        };
        let extension = random.usual(&extensions, 6, 8);
        bytes.extend_from_slice(format!("{size}{extension}").as_bytes());
        bytes.extend_from_slice(random.usual(&ends, 5, 20));
        bytes.extend_from_slice(&data);
        bytes.extend_from_slice(random.usual(&ends, 5, 20));
    }
    bytes.extend_from_slice(random.pick(&["0", "000", "0;last"]).as_bytes());
    bytes.extend_from_slice(b"\r\n");
    if random.once_in(6) {
        let most = if random.once_in(20) { 103 } else { 3 };
        for _ in 0..=random.below(most) {
            bytes.extend_from_slice(
                random
                    .pick(&["a: b\r\n", "Content-Length: 5\r\n", "x:\r\n"])
                    .as_bytes(),
            );
        }
    }
    bytes.extend_from_slice(b"\r\n");
    bytes
}
