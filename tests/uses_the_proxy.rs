//! What goes upstream goes through the proxy, refreshes too; what stays on this machine does not.

mod common;
use common::*;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A proxy that records what it was asked for and tunnels everything to one place.
struct Proxy {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn start(to: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let addr = listener.local_addr().expect("an address");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = asked.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let all = all.clone();
                thread::spawn(move || tunnel(client, to, &all));
            }
        });
        Proxy { addr, asked }
    }

    fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }
}

/// Asked for a name that begins with `slow`, it says nothing for a while before the tunnel opens.
fn tunnel(mut client: TcpStream, to: SocketAddr, asked: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut first = [0];
    client.peek(&mut first)?;
    let target = if first[0] == 5 {
        socks(&mut client)?
    } else {
        connect(&client)?
    };
    if target.contains(" slow") {
        thread::sleep(Duration::from_millis(1500));
    }
    lock(asked).push(target);
    let (mut up, mut down) = (TcpStream::connect(to)?, client.try_clone()?);
    let mut back = up.try_clone()?;
    thread::spawn(move || io::copy(&mut back, &mut down));
    io::copy(&mut client, &mut up).map(|_| ())
}

fn connect(client: &TcpStream) -> io::Result<String> {
    let mut wire = Wire::plain(client.try_clone()?);
    let head = wire.head()?.expect("a head");
    let key = head
        .get("proxy-authorization")
        .map(|value| format!(" {value}"));
    wire.send(b"HTTP/1.1 200 Connected\r\n\r\n")?;
    Ok(format!(
        "{} {}{}",
        head.word(0),
        head.word(1),
        key.unwrap_or_default()
    ))
}

fn socks(client: &mut TcpStream) -> io::Result<String> {
    let mut read = |n: usize| {
        let mut bytes = vec![0; n];
        client.read_exact(&mut bytes).map(|()| bytes)
    };
    let methods = read(2)?[1];
    read(usize::from(methods))?;
    client.write_all(&[5, 0])?;
    let mut read = |n: usize| {
        let mut bytes = vec![0; n];
        client.read_exact(&mut bytes).map(|()| bytes)
    };
    let name = match read(4)?[3] {
        1 => Ipv4Addr::from(<[u8; 4]>::try_from(read(4)?).expect("four bytes")).to_string(),
        _ => {
            let size = usize::from(read(1)?[0]);
            String::from_utf8_lossy(&read(size)?).into_owned()
        }
    };
    let port = u16::from_be_bytes(read(2)?.try_into().expect("two bytes"));
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    Ok(format!("SOCKS {name}:{port}"))
}

/// Claude lives at a name that only the proxy knows; ChatGPT on this machine.
fn far_away(host: &str) -> (Upstream, Upstream, Proxy, Setup) {
    let authority = Authority::new();
    let far = Upstream::tls(&authority, |_, conn| {
        conn.respond(200, &[("connection", "close")], b"far")
    });
    let near = Upstream::start(|_, conn| conn.respond(200, &[], b"near"));
    let proxy = Proxy::start(far.addr);
    let setup = Setup::new(&near).beside(&far);
    let setup = setup.save("claude", &far.login("claude", -10).claude());
    let roots = setup.write("roots.pem", authority.cert_pem);
    let setup = setup
        .env("SSL_CERT_FILE", roots)
        .provider(0, "base_url", format!("https://{host}/anthropic"))
        .provider(0, "token_url", format!("https://{host}/claude/token"));
    (far, near, proxy, setup)
}

fn assert_proxied(far: &Upstream, proxy: &Proxy, mux: &Mux, asked: &str) {
    assert_eq!(mux.message().text(), "far");
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").text(), "near");
    assert_eq!(far.refreshes().len(), 1);
    assert!(
        proxy.asked().len() <= 2 && proxy.asked().iter().all(|target| target == asked),
        "{:?}",
        proxy.asked()
    );
    let request = far.requests().pop().expect("a request");
    let host = asked.split([' ', ':']).nth(1);
    assert_eq!(request.head.get("host"), host);
    assert_eq!(request.head.get("proxy-authorization"), None);
}

/// All names are the proxy's, which leads to a stand-in.
#[test]
fn by_default_it_goes_to_the_vendors() {
    let authority = Authority::new();
    let far = Upstream::tls(&authority, |_, conn| conn.respond(200, &[], b"far"));
    let proxy = Proxy::start(far.addr);
    let setup = Setup::bare(&far).set("providers", json!(["claude", "chatgpt"]));
    let setup = setup.save("claude", &far.login("claude", -10).claude());
    let setup = setup.save("chatgpt", &far.login("chatgpt", -10).codex());
    let roots = setup.write("roots.pem", authority.cert_pem);
    let setup = setup.env("SSL_CERT_FILE", roots);
    let mux = setup.set("proxy", format!("http://{}", proxy.addr)).start();
    assert_eq!(mux.message().text(), "far");
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").text(), "far");
    let asked = |requests: Vec<Request>| {
        let url = |r: &Request| format!("{}{}", r.head.get("host").unwrap_or(""), r.head.word(1));
        let mut urls: Vec<_> = requests.iter().map(url).collect();
        urls.sort();
        urls
    };
    let answers = [
        "api.anthropic.com/v1/messages",
        "chatgpt.com/backend-api/codex/responses",
    ];
    let refreshes = [
        "auth.openai.com/oauth/token",
        "platform.claude.com/v1/oauth/token",
    ];
    assert_eq!(asked(far.requests()), answers);
    assert_eq!(asked(far.refreshes()), refreshes);
    let connects = |target: &String| target.starts_with("CONNECT ") && target.ends_with(":443");
    assert!(proxy.asked().iter().all(connects), "{:?}", proxy.asked());
}

#[test]
fn an_http_proxy() {
    let (far, _near, proxy, setup) = far_away("upstream.test");
    let mux = setup.set("proxy", format!("http://{}", proxy.addr)).start();
    assert_proxied(&far, &proxy, &mux, "CONNECT upstream.test:443");
}

#[test]
fn an_http_proxy_with_a_password() {
    let (far, near, proxy, setup) = far_away("upstream.test");
    near.secret("Tz6wQn3LkP");
    near.secret("dTpUejZ3UW4zTGtQ");
    let mux = setup
        .set("proxy", format!("http://u:Tz6wQn3LkP@{}", proxy.addr))
        .set("log_level", "debug")
        .start();
    assert_proxied(
        &far,
        &proxy,
        &mux,
        "CONNECT upstream.test:443 Basic dTpUejZ3UW4zTGtQ",
    );
    mux.wait_log("DEBUG");
    let log = mux.log();
    assert!(
        log.contains("DEBUG") && !log.contains("[rustls"),
        "the crates say little"
    );
}

#[test]
fn a_socks_proxy_that_is_given_names() {
    let (far, _near, proxy, setup) = far_away("upstream.test");
    let mux = setup
        .set("proxy", format!("socks5h://{}", proxy.addr))
        .start();
    assert_proxied(&far, &proxy, &mux, "SOCKS upstream.test:443");
}

#[test]
fn a_socks_proxy_that_is_given_addresses() {
    let (far, _near, proxy, setup) = far_away("192.0.2.1");
    let mux = setup
        .set("proxy", format!("socks5://{}", proxy.addr))
        .start();
    assert_proxied(&far, &proxy, &mux, "SOCKS 192.0.2.1:443");
}

/// The proxy's own address is looked up the same way, and does not drive the other one out.
#[test]
fn a_name_that_is_known_needs_no_name_server_for_socks() {
    let (_far, _near, proxy, setup) = far_away("upstream.test");
    let hosts = setup.write("hosts", "192.0.2.1 upstream.test\n");
    let Some(script) = setup::mounting(&hosts, "/etc/hosts") else {
        return say("SKIPPED: only root has an /etc/hosts of its own");
    };
    let setup = setup.set("proxy", format!("socks5://{}", proxy.addr));
    let mux = setup.shell(&script).start();
    assert_eq!(mux.message().text(), "far");
    let asked = proxy.asked().len();
    fs::write(&hosts, "192.0.2.2 upstream.test\n").expect("move the name");
    assert_eq!(mux.message().text(), "far");
    assert_eq!(proxy.asked()[asked..], ["SOCKS 192.0.2.1:443"]);
}

#[test]
fn a_proxy_of_the_environment() {
    let names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    for name in names {
        let (far, _near, proxy, setup) = far_away("upstream.test");
        // One that is empty is none.
        let setup = names.iter().fold(setup, |setup, name| setup.env(name, ""));
        let mux = setup.env(name, format!("http://{}", proxy.addr)).start();
        assert_proxied(&far, &proxy, &mux, "CONNECT upstream.test:443");
    }
}

#[test]
fn the_configuration_wins_over_the_environment() {
    let (far, _near, proxy, setup) = far_away("upstream.test");
    let other = Proxy::start(far.addr);
    let setup = setup
        .env("HTTPS_PROXY", format!("http://{}", other.addr))
        .env("NO_PROXY", "upstream.test");
    let mux = setup.set("proxy", format!("http://{}", proxy.addr)).start();
    assert_proxied(&far, &proxy, &mux, "CONNECT upstream.test:443");
    assert_eq!(other.asked().len(), 0);
}

/// As curl has it: the more special one wins.
#[test]
fn https_proxy_wins_over_all_proxy() {
    let (far, _near, proxy, setup) = far_away("upstream.test");
    let setup = setup.env("ALL_PROXY", "http://127.0.0.1:1");
    let mux = setup
        .env("HTTPS_PROXY", format!("http://{}", proxy.addr))
        .start();
    assert_proxied(&far, &proxy, &mux, "CONNECT upstream.test:443");
}

#[test]
fn no_proxy_is_obeyed() {
    for list in [
        "other.test,upstream.test",
        "other.test, Upstream.TEST",
        "*",
        "test",
        ".test",
        "*.test",
    ] {
        for name in ["NO_PROXY", "no_proxy"] {
            let (_far, _near, proxy, setup) = far_away("upstream.test");
            let setup = setup.env("HTTPS_PROXY", format!("http://{}", proxy.addr));
            let mux = setup.env(name, list).start();
            // Without its proxy the name means nothing.
            assert_eq!(mux.message().status, 503, "{name}={list}");
            assert_eq!(proxy.asked().len(), 0, "{name}={list}");
        }
    }
    let (far, _near, proxy, setup) = far_away("upstream.test");
    let setup = setup.env("HTTPS_PROXY", format!("http://{}", proxy.addr));
    let others = "upstream,stream.test,.upstream.test.other,,127.0.0.1";
    let mux = setup.env("NO_PROXY", others).start();
    assert_proxied(&far, &proxy, &mux, "CONNECT upstream.test:443");
}

/// Over TLS as well.
#[test]
fn what_stays_on_this_machine_goes_past_the_proxy() {
    let authority = Authority::new();
    let near = Upstream::tls(&authority, |_, conn| conn.respond(200, &[], b"near"));
    let proxy = Proxy::start(near.addr);
    let setup = Setup::new(&near).save("claude", &near.login("claude", -10).claude());
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let setup = setup.env("SSL_CERT_FILE", roots);
    let mux = setup.set("proxy", format!("http://{}", proxy.addr)).start();
    assert_eq!(mux.message().text(), "near");
    assert_eq!(near.refreshes().len(), 1);
    assert!(proxy.asked().is_empty(), "{:?}", proxy.asked());
}

#[test]
fn a_proxy_that_is_not_there_is_502() {
    let up = Upstream::plain();
    let gone = setup::free_address();
    let setup = Setup::new(&up)
        .provider(0, "base_url", "https://upstream.test")
        .set("proxy", format!("http://{gone}"));
    let expired = up.login("claude", -10).claude();
    let mux = setup.start();
    let answer = mux.message();
    assert_eq!(answer.status, 502);
    let said = answer.error();
    assert!(said.contains("through the proxy"), "{said}");
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    // A refresh says so, too.
    let setup = Setup::new(&up).save("claude", &expired);
    let setup = setup.set("proxy", format!("http://{gone}"));
    let mux = setup
        .provider(0, "token_url", "https://upstream.test")
        .start();
    let answer = mux.message();
    assert_eq!(answer.status, 503);
    let said = answer.error();
    assert!(said.contains("through the proxy"), "{said}");
}

/// A name that ends in the root's dot is nobody's part: without a list, it goes to the proxy.
#[test]
fn an_empty_item_of_no_proxy_stands_for_nothing() {
    for list in ["", "other.test,", "."] {
        let (far, _near, proxy, setup) = far_away("upstream.test.");
        let setup = setup.env("HTTPS_PROXY", format!("http://{}", proxy.addr));
        let mux = setup.env("NO_PROXY", list).start();
        mux.message();
        assert_eq!(proxy.asked()[0], "CONNECT upstream.test.:443", "{list}");
        drop(far);
    }
}

/// A variable that is for plain HTTP, which is never spoken to a far upstream; and one that means nothing.
#[test]
fn a_proxy_for_something_else_is_not_used_and_a_wrong_one_is_an_error() {
    let (_far, _near, proxy, setup) = far_away("upstream.test");
    let mux = setup
        .env("HTTP_PROXY", format!("http://{}", proxy.addr))
        .start();
    assert_eq!(mux.message().status, 503);
    assert_eq!(proxy.asked().len(), 0);
    let (_far, _near, _proxy, setup) = far_away("upstream.test");
    let (code, said) = setup
        .env("HTTPS_PROXY", "gopher://Tz6wQn3LkP@localhost:1")
        .refused();
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("HTTPS_PROXY") && !said.contains("Tz6wQn3LkP"),
        "{said}"
    );
}

/// Claude's answers come from there, by a proxy.
fn through(scheme: &str, far: &Upstream, authority: &Authority) -> (Proxy, Setup) {
    let proxy = Proxy::start(far.addr);
    let setup = Setup::new(far);
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let setup = setup
        .env("SSL_CERT_FILE", roots)
        .provider(0, "base_url", "https://slow.test/anthropic")
        .set("proxy", format!("{scheme}://{}", proxy.addr));
    (proxy, setup)
}

/// `stream_idle_timeout` is for bodies, on whatever way: not for a tunnel, a handshake or a head.
#[test]
fn a_slow_proxy_and_a_slow_head_behind_it_are_waited_for() {
    for scheme in ["http", "socks5h"] {
        let authority = Authority::new();
        let far = Upstream::tls(&authority, |_, conn| {
            thread::sleep(Duration::from_millis(1500));
            conn.respond(200, &[], b"far")
        });
        let (proxy, setup) = through(scheme, &far, &authority);
        let mux = setup.set("stream_idle_timeout", "500ms").start();
        assert_eq!(mux.message().text(), "far", "{scheme}");
        assert_eq!(proxy.asked().len(), 1);
    }
}

/// To see whether it is still open takes no time, and the end of an answer is passed on at once.
#[test]
fn a_connection_behind_a_proxy_is_kept() {
    for scheme in ["http", "socks5h"] {
        let authority = Authority::new();
        let far = Upstream::tls(&authority, |_, conn| {
            conn.stream(&[])?;
            conn.chunk("far")?;
            conn.finish()
        });
        let (proxy, setup) = through(scheme, &far, &authority);
        let mux = setup.start();
        for _ in 0..3 {
            assert_eq!(mux.message().text(), "far", "{scheme}");
        }
        assert_eq!(proxy.asked().len(), 1, "{scheme}");
    }
}

#[test]
fn silence_in_a_body_behind_a_proxy_breaks_it_off() {
    for scheme in ["http", "socks5h"] {
        let end = Steps::default();
        let held = end.clone();
        let authority = Authority::new();
        let far = Upstream::tls(&authority, move |_, conn| {
            conn.stream(&[])?;
            conn.chunk("data: 1\n\n")?;
            held.wait(1);
            conn.finish()
        });
        let (_proxy, setup) = through(scheme, &far, &authority);
        let mux = setup.set("stream_idle_timeout", "1s").start();
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER], b"{}");
        client.head();
        assert_eq!(client.text(), "data: 1\n\n", "{scheme}");
        client.piece().expect_err("an end that is no end");
        mux.wait_log("stream_idle_timeout");
        end.advance();
    }
}

#[test]
fn a_proxy_that_is_too_slow_is_504() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let proxy = listener.local_addr().expect("an address");
    let end = Steps::default();
    let held = end.clone();
    thread::spawn(move || {
        let mut wire = Wire::plain(listener.accept()?.0);
        wire.head()?;
        wire.send(b"HTTP/1.1 200 Connected\r\n")?;
        held.wait(1);
        io::Result::Ok(())
    });
    let up = Upstream::plain();
    let mux = Setup::new(&up)
        .provider(0, "base_url", "https://upstream.test")
        .set("proxy", format!("http://{proxy}"))
        .set("request_timeout", "1s")
        .start();
    let answer = mux.message();
    assert_eq!(answer.status, 504);
    let said = answer.error();
    assert!(said.contains("request_timeout"), "{said}");
    assert!(said.contains("through the proxy"), "{said}");
    end.advance();
}

/// The token call's own limit, 30 s, holds however often the proxy says a little.
#[test]
fn a_proxy_that_drips_ends_a_refresh() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let proxy = listener.local_addr().expect("an address");
    let drips = thread::spawn(move || -> io::Result<()> {
        let mut wire = Wire::plain(listener.accept()?.0);
        wire.head()?;
        wire.send(b"HTTP/1.1 200 Connected\r\nx-wait: ")?;
        for _ in 0..400 {
            wire.send(b".")?;
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    });
    let up = Upstream::plain();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let mux = setup
        .provider(0, "token_url", "https://upstream.test")
        .set("proxy", format!("http://{proxy}"))
        .start();
    let hung_up = drips.join().expect("the proxy ends");
    hung_up.expect_err("80 s of a token call");
    let answer = mux.message();
    assert_eq!(answer.status, 503);
    let said = answer.error();
    assert!(said.contains("through the proxy"), "{said}");
}
