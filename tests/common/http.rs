//! One HTTP/1.1 connection, read and written by hand: what the scripted upstream and the client share.
//! A head's `raw` is what came; of its parts, leading spaces of values are dropped, as are a body's chunk
//! extensions.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// How long a test waits for one thing, as a rule; it only guards against a hang.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub trait Io: Read + Write + Send {}
impl<T: Read + Write + Send> Io for T {}

/// A socket, plain or with TLS around it, and what was read from it but not yet looked at.
pub struct Wire {
    io: Box<dyn Io>,
    socket: TcpStream,
    ahead: Vec<u8>,
}

/// The head of a request or of a response, as it came and in parts.
#[derive(Clone, Debug)]
pub struct Head {
    pub raw: Vec<u8>,
    pub start: String,
    pub headers: Vec<(String, String)>,
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug)]
pub enum Framing {
    Sized(usize),
    Chunked,
    UntilClose,
    Done,
}

impl Wire {
    pub fn plain(socket: TcpStream) -> Wire {
        let io = socket.try_clone().expect("clone a socket");
        Wire::new(Box::new(io), socket)
    }

    pub fn new(io: Box<dyn Io>, socket: TcpStream) -> Wire {
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("set a read timeout");
        socket
            .set_write_timeout(Some(PATIENCE))
            .expect("set a write timeout");
        socket.set_nodelay(true).expect("set nodelay");
        Wire {
            io,
            socket,
            ahead: Vec::new(),
        }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes)?;
        self.io.flush()
    }

    /// Half a close: the other side sees the end of what we send, we still read.
    pub fn end_sending(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Ends the connection for every holder of the socket, with no word of TLS.
    pub fn cut(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads once. False at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        let mut piece = [0; 64 * 1024];
        let n = loop {
            match self.io.read(&mut piece) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.ahead.extend_from_slice(&piece[..n]);
        Ok(n > 0)
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        self.ahead.drain(..n).collect()
    }

    /// What has arrived by now or arrives next; empty at the end of the stream.
    pub fn some(&mut self) -> io::Result<Vec<u8>> {
        if self.ahead.is_empty() {
            self.fill()?;
        }
        Ok(self.take(self.ahead.len()))
    }

    fn exactly(&mut self, n: usize) -> io::Result<Vec<u8>> {
        while self.ahead.len() < n {
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.take(n))
    }

    /// Everything up to and with `mark`. None if the stream ended before its first byte.
    fn until(&mut self, mark: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut from = 0;
        loop {
            if let Some(at) = self.ahead[from..]
                .windows(mark.len())
                .position(|w| w == mark)
            {
                return Ok(Some(self.take(from + at + mark.len())));
            }
            from = self.ahead.len().saturating_sub(mark.len() - 1);
            if !self.fill()? {
                return match self.ahead.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    pub fn head(&mut self) -> io::Result<Option<Head>> {
        let Some(raw) = self.until(b"\r\n\r\n")? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&raw).into_owned();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .map(|line| line.split_once(':').expect("a header has a colon"))
            .map(|(name, value)| (name.to_owned(), value.trim_start_matches(' ').to_owned()))
            .collect();
        Ok(Some(Head {
            raw,
            start,
            headers,
        }))
    }

    /// The next piece of a body: one chunk, or whatever arrives next. None at its proper end; a body
    /// that breaks off is an error.
    pub fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Vec<u8>>> {
        match *framing {
            Framing::Done | Framing::Sized(0) => Ok(None),
            Framing::Sized(left) => {
                if self.ahead.is_empty() && !self.fill()? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let piece = self.take(left.min(self.ahead.len()));
                *framing = Framing::Sized(left - piece.len());
                Ok(Some(piece))
            }
            Framing::Chunked => self.chunk(framing),
            Framing::UntilClose => Ok(Some(self.some()?).filter(|piece| !piece.is_empty())),
        }
    }

    fn chunk(&mut self, framing: &mut Framing) -> io::Result<Option<Vec<u8>>> {
        let size = self.until(b"\r\n")?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let size = String::from_utf8_lossy(&size);
        let size = size.split([';', '\r']).next().unwrap_or_default();
        let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
        if size > 0 {
            let piece = self.exactly(size)?;
            return match self.exactly(2)?.as_slice() {
                b"\r\n" => Ok(Some(piece)),
                _ => Err(io::Error::other("a chunk without its line end")),
            };
        }
        // ai-mux drops trailers, both ways: neither its upstream nor its client may see any.
        if self.exactly(2)? != b"\r\n" {
            return Err(io::Error::other("trailers behind the last chunk"));
        }
        *framing = Framing::Done;
        Ok(None)
    }

    pub fn body(&mut self, mut framing: Framing) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece(&mut framing)? {
            body.extend(piece);
        }
        Ok(body)
    }
}

impl Head {
    /// The first header of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        let named = self
            .headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }

    /// The word at `n` of the first line, from 0.
    pub fn word(&self, n: usize) -> &str {
        self.start.split(' ').nth(n).unwrap_or_default()
    }

    /// The framing that the headers state; `otherwise` when they state none.
    pub fn framing(&self, otherwise: Framing) -> Framing {
        if self.get("transfer-encoding").is_some() {
            return Framing::Chunked;
        }
        let length = self.get("content-length").and_then(|n| n.parse().ok());
        length.map_or(otherwise, Framing::Sized)
    }
}
