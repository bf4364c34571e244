//! A raw HTTP/1.1 client that shows each piece of an answer as it comes, and how the answer ended.

use super::http::{Framing, Head, PATIENCE, Wire};
use super::tls::Authority;
use serde_json::Value;
use std::io;
use std::net::{SocketAddr, TcpStream};

pub struct Client {
    pub wire: Wire,
    framing: Framing,
    method: String,
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub head: Head,
    pub body: Vec<u8>,
}

impl Client {
    pub fn new(addr: SocketAddr) -> Client {
        let socket = TcpStream::connect_timeout(&addr, PATIENCE).expect("connect to ai-mux");
        Client::on(Wire::plain(socket))
    }

    /// Over TLS, trusting `authority` alone.
    pub fn tls(addr: SocketAddr, authority: &Authority) -> Client {
        Client::on(
            authority
                .connect(addr, rustls::ALL_VERSIONS)
                .expect("a TLS handshake"),
        )
    }

    pub fn on(wire: Wire) -> Client {
        Client {
            wire,
            framing: Framing::Done,
            method: String::new(),
        }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Client {
        self.wire.send(bytes.as_ref()).expect("send to ai-mux");
        self
    }

    /// Sends a whole request: these headers, `host`, and the length of its body, which a POST has even if empty.
    pub fn request(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> &mut Client {
        let length = body.len().to_string();
        let mut all = headers.to_vec();
        if !body.is_empty() || method == "POST" {
            all.push(("content-length", &length));
        }
        self.start(method, target, &all);
        self.send(body)
    }

    /// Sends a request's head alone.
    pub fn start(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> &mut Client {
        self.method = method.to_owned();
        let lines: String = headers
            .iter()
            .map(|(n, v)| format!("{n}: {v}\r\n"))
            .collect();
        self.send(format!(
            "{method} {target} HTTP/1.1\r\nhost: ai-mux\r\n{lines}\r\n"
        ))
    }

    pub fn chunk(&mut self, bytes: &[u8]) -> &mut Client {
        self.send([format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())
    }

    /// The final chunk of a request.
    pub fn finish(&mut self) -> &mut Client {
        self.send("0\r\n\r\n")
    }

    pub fn head(&mut self) -> Head {
        self.try_head()
            .expect("read a head")
            .expect("a head before the end")
    }

    pub fn try_head(&mut self) -> io::Result<Option<Head>> {
        let head = self.wire.head()?;
        if let Some(head) = &head {
            let bodyless = self.method == "HEAD"
                || matches!(head.word(1), "204" | "304")
                || head.word(1).starts_with('1');
            self.framing = if bodyless {
                Framing::Done
            } else {
                head.framing(Framing::UntilClose)
            };
        }
        Ok(head)
    }

    /// The next piece of the body: a chunk by itself, or what arrived. None at its proper end.
    pub fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.wire.piece(&mut self.framing)
    }

    /// The next piece as text, when there must be one.
    pub fn text(&mut self) -> String {
        let piece = self
            .piece()
            .expect("read a piece")
            .expect("a piece before the end");
        String::from_utf8(piece).expect("a piece of text")
    }

    /// The rest of the body. An error if it broke off.
    pub fn body(&mut self) -> io::Result<Vec<u8>> {
        self.wire.body(self.framing)
    }

    pub fn answer(&mut self) -> Answer {
        let head = self.head();
        let status = head.word(1).parse().expect("a status");
        let body = self.body().expect("a whole body");
        Answer { status, head, body }
    }

    /// True if the other side ended the connection and sent nothing more; false if it sent something.
    pub fn closed(&mut self) -> bool {
        match self.wire.some() {
            Ok(rest) => rest.is_empty(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                panic!("the connection is still open")
            }
            Err(_) => true,
        }
    }

    /// Everything until the connection ends, as it must, whatever it is and however it ends.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.wire.some() {
                Ok(piece) if !piece.is_empty() => all.extend(piece),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the connection is still open")
                }
                _ => return all,
            }
        }
    }
}

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body of text")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a body of JSON")
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.get(name)
    }

    /// The message of an error in the shape that both vendors' SDKs read, every part of which is checked.
    pub fn error(&self) -> String {
        let json = self.json();
        assert_eq!(json["type"], "error", "{json}");
        let error = json["error"].as_object().expect("an error object");
        let kind = match self.status {
            400 | 426 => "invalid_request_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            413 | 431 => "request_too_large",
            _ => "api_error",
        };
        assert_eq!(error["type"], kind, "{} {json}", self.status);
        assert!(error["param"].is_null() && error.len() == 4, "{json}");
        let code = match self.status {
            400 => "bad_request",
            401 => "unauthorized",
            403 => "forbidden",
            404 => "not_found",
            408 => "request_timeout",
            413 => "payload_too_large",
            426 => "upgrade_required",
            431 => "request_header_fields_too_large",
            502 => "bad_gateway",
            503 => "service_unavailable",
            504 => "gateway_timeout",
            _ => "internal_server_error",
        };
        assert_eq!(error["code"], code, "{json}");
        let message = error["message"].as_str().expect("a message");
        assert!(!message.is_empty(), "{json}");
        message.to_owned()
    }
}
