//! tiny_http itself, over a Unix socket as in the program: how it reads what it is given.

use crate::common::{Folder, PATIENCE};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is sent behind every request: if it comes out unharmed, the request ended where it should.
const NEXT: &[u8] = b"GET /the-next-request HTTP/1.1\r\n\r\n";

pub struct Tiny {
    server: tiny_http::Server,
    path: PathBuf,
    _folder: Folder,
}

struct Connection {
    socket: UnixStream,
    /// Nothing more will be sent over it.
    ended: bool,
}

/// A request as tiny_http has read it.
#[derive(Debug, PartialEq)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Connection {
    fn end(&mut self) {
        self.ended = true;
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

impl Tiny {
    pub fn start() -> Tiny {
        let folder = Folder::new();
        let path = folder.0.join("inner.sock");
        let listener = UnixListener::bind(&path).expect("bind a Unix socket");
        let server = tiny_http::Server::from_listener(listener, None).expect("start tiny_http");
        Tiny {
            server,
            path,
            _folder: folder,
        }
    }

    fn connect(&self) -> Connection {
        let socket = UnixStream::connect(&self.path).expect("connect to tiny_http");
        let soon = Some(Duration::from_millis(50));
        socket.set_read_timeout(soon).expect("set a timeout");
        socket
            .set_write_timeout(Some(PATIENCE))
            .expect("set a timeout");
        Connection {
            socket,
            ended: false,
        }
    }

    /// Sends a whole request as a client sent it, over a connection of its own, and the next one behind it;
    /// `last` if tiny_http is right to end the connection after the first.
    pub fn read_whole(&self, request: &[u8], last: bool) -> Result<Seen, String> {
        let mut connection = self.connect();
        // A refusal may come, and the connection end, before all is written.
        let _ = connection.socket.write_all(&[request, NEXT].concat());
        connection.end();
        let seen = self.seen(&mut connection, request.len())?;
        if !last {
            self.next(&mut connection)?;
        }
        Ok(seen)
    }

    fn seen(&self, connection: &mut Connection, most: usize) -> Result<Seen, String> {
        let mut request = self.receive(connection)?;
        let mut body = Vec::new();
        // Read past its proper end, if it goes there. A body that tiny_http cannot decode is cut short here.
        let mut reader = request.as_reader().take(most as u64 + 1);
        let _ = reader.read_to_end(&mut body);
        let text = |text: &dyn std::fmt::Display| text.to_string();
        let fields = request.headers().iter();
        let seen = Seen {
            method: text(request.method()),
            target: request.url().to_owned(),
            fields: fields.map(|h| (text(&h.field), text(&h.value))).collect(),
            body,
        };
        drop(request.into_writer());
        Ok(seen)
    }

    fn next(&self, connection: &mut Connection) -> Result<(), String> {
        let next = self.seen(connection, NEXT.len())?;
        match (next.method.as_str(), next.target.as_str()) {
            ("GET", "/the-next-request") if next.fields.is_empty() => Ok(()),
            _ => Err(format!("the next request begins elsewhere: {next:?}")),
        }
    }

    /// The next request, or why there is none: tiny_http says so by ending the connection when it has read
    /// the end of it.
    fn receive(&self, connection: &mut Connection) -> Result<tiny_http::Request, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = Vec::new();
        loop {
            let request = self.server.recv_timeout(Duration::from_millis(100));
            if let Some(request) = request.map_err(|e| e.to_string())? {
                return Ok(request);
            }
            connection.end();
            let mut piece = [0; 1024];
            match connection.socket.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => heard.extend_from_slice(&piece[..count]),
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
                Err(_) => break,
            }
        }
        // It may have come just before the end.
        match self.server.try_recv() {
            Ok(Some(request)) => Ok(request),
            _ => Err(format!(
                "tiny_http gives no request, but {:?}",
                String::from_utf8_lossy(&heard)
            )),
        }
    }
}
