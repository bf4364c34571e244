//! A certificate made for one test, the side that shows it and the side that trusts it.

use super::http::Wire;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};
use rustls::{ServerConnection, SupportedProtocolVersion};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

#[derive(Clone)]
pub struct Authority {
    pub cert_pem: String,
    pub key_pem: String,
    cert: CertificateDer<'static>,
    pub key: Vec<u8>,
}

impl Authority {
    /// A new self-signed certificate for localhost, and the key to it; for the vendors' names, too.
    pub fn new() -> Authority {
        Authority::with(rcgen::KeyPair::generate().expect("a key pair"))
    }

    pub fn with(key: rcgen::KeyPair) -> Authority {
        let names = [
            "localhost",
            "127.0.0.1",
            "upstream.test",
            "slow.test",
            "192.0.2.1",
            "api.anthropic.com",
            "platform.claude.com",
            "chatgpt.com",
            "auth.openai.com",
        ]
        .map(str::to_owned);
        let params = rcgen::CertificateParams::new(names).expect("parameters");
        let cert = params.self_signed(&key).expect("a certificate");
        Authority {
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
            cert: cert.der().clone(),
            key: key.serialize_der(),
        }
    }

    pub fn connect(
        &self,
        addr: SocketAddr,
        versions: &[&'static SupportedProtocolVersion],
    ) -> io::Result<Wire> {
        self.connect_with(addr, versions, b"")
    }

    pub fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> ClientConnection {
        self.client_of(versions, &[])
    }

    /// One that can speak these protocols only (ALPN), and says so if there are any.
    pub fn client_of(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        protocols: &[&str],
    ) -> ClientConnection {
        let mut roots = RootCertStore::empty();
        roots.add(self.cert.clone()).expect("a root");
        let mut config = ClientConfig::builder_with_protocol_versions(versions)
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|&name| name.into()).collect();
        let name = ServerName::try_from("localhost").expect("a name");
        ClientConnection::new(Arc::new(config), name).expect("a client")
    }

    /// Sends `early` together with the last of the handshake.
    pub fn connect_with(
        &self,
        addr: SocketAddr,
        versions: &[&'static SupportedProtocolVersion],
        early: &[u8],
    ) -> io::Result<Wire> {
        let mut tls = self.client(versions);
        tls.writer().write_all(early)?;
        let mut socket = TcpStream::connect_timeout(&addr, super::http::PATIENCE)?;
        socket.set_read_timeout(Some(super::http::PATIENCE))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        let raw = socket.try_clone()?;
        Ok(Wire::new(Box::new(StreamOwned::new(tls, socket)), raw))
    }

    pub fn server(&self) -> ServerConnection {
        let key = PrivateKeyDer::try_from(self.key.clone()).expect("a key");
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], key)
            .expect("a pair");
        ServerConnection::new(Arc::new(config)).expect("a server")
    }

    pub fn accept(&self, socket: TcpStream) -> io::Result<Wire> {
        let tls = self.server();
        let raw = socket.try_clone()?;
        Ok(Wire::new(Box::new(StreamOwned::new(tls, socket)), raw))
    }
}
