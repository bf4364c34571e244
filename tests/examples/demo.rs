//! Shows what ai-mux does, with no account and without leaving this machine: the real binary in front of a
//! stand-in for both vendors. `--once` ends after the show; otherwise it goes on serving until Ctrl-C.

#[path = "../common/build.rs"]
mod build;
#[path = "../common/mod.rs"]
mod common;

use common::*;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const WORDS: [&str; 8] = [
    "Each",
    " of",
    " these",
    " words",
    " came",
    " when",
    " it",
    " was sent.",
];
/// How long the stand-in thinks between two words.
const PAUSE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let once = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [only] if only == "--once" => true,
        _ => {
            eprintln!("usage: demo [--once]");
            return ExitCode::from(2);
        }
    };
    build::build();
    let over = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, over.clone()).expect("listen for signals");
    }
    let sent = Arc::new(Mutex::new(Vec::new()));
    let clock = sent.clone();
    let up = Upstream::start(move |req, conn| answer(req, conn, &clock));
    let logins = ["claude", "chatgpt"].map(|name| (name, up.login(name, -600)));
    let setup = Setup::bare(&up).save("claude", &logins[0].1.claude());
    let mut mux = setup.save("chatgpt", &logins[1].1.codex()).start();

    title(&mux, &up);
    refreshed(&mux, &logins);
    streamed(&mux, &sent);
    refused(&mux);
    adopted(&mux, &up);
    if !once {
        serve(&mux, &over);
    }
    let code = mux.stop();
    println!("\n{}", dim("ai-mux was asked to stop, and did."));
    ExitCode::from(u8::from(code != 0))
}

fn paint(code: &str, text: &str) -> String {
    match io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

fn dim(text: &str) -> String {
    paint("2", text)
}

fn good(text: &str) -> String {
    paint("32", text)
}

fn heading(number: usize, text: &str) {
    println!("\n{}", paint("1", &format!("{number}  {text}")));
}

fn line(name: &str, text: &str) {
    println!("   {}{text}", dim(&format!("{name:<12}")));
}

/// A token by its first characters, as the log would name it.
fn named(token: &str) -> String {
    format!("{}…", &token[..8])
}

fn title(mux: &Mux, up: &Upstream) {
    println!(
        "\n{}",
        paint(
            "1",
            "ai-mux, with no account: nothing here leaves this machine"
        )
    );
    println!();
    line(
        "ai-mux",
        &format!("http://{}  (the real binary, pid {})", mux.addr, mux.pid()),
    );
    line("vendors", &format!("{}  (a stand-in for both)", up.url()));
}

fn refreshed(mux: &Mux, logins: &[(&str, Login); 2]) {
    heading(
        1,
        "An expired login is refreshed, saved, and only then used",
    );
    for (name, login) in logins {
        mux.wait_log(&format!("{name}: refreshed"));
        let file = login::read(&mux.state(), name);
        let field = if *name == "claude" {
            "/claudeAiOauth/refreshToken"
        } else {
            "/tokens/refresh_token"
        };
        let new = file
            .pointer(field)
            .and_then(Value::as_str)
            .expect("a refresh token");
        assert_ne!(new, login.refresh);
        let (old, new) = (named(&login.refresh), good(&named(new)));
        line(
            name,
            &format!("expired 10 minutes ago; refresh token {old} spent, {new} on disk"),
        );
    }
}

/// `sent` is when the stand-in sent each event: both ends are this program, so one clock measures the way.
fn streamed(mux: &Mux, sent: &Mutex<Vec<Instant>>) {
    heading(2, "An answer streams in, each event as it is sent");
    line("after", "behind      event");
    let mut client = mux.client();
    let begin = Instant::now();
    client.request("POST", MESSAGES, &[BEARER], br#"{"stream":true}"#);
    assert_eq!(client.head().word(1), "200");
    let (mut words, mut number) = (String::new(), 0);
    while let Some(piece) = client.piece().expect("a whole stream") {
        let now = Instant::now();
        // Two events that were sent in the same instant may come in one piece.
        for event in String::from_utf8_lossy(&piece).split_terminator("\n\n") {
            let (name, word) = parts(event);
            let behind = now.saturating_duration_since(lock(sent)[number]);
            let after = format!("{:.2} s", now.duration_since(begin).as_secs_f64());
            let shown = if word.is_empty() {
                dim(&name)
            } else {
                good(word.trim())
            };
            line(
                &after,
                &format!("{:5.2} ms    {shown}", behind.as_secs_f64() * 1000.0),
            );
            words.push_str(&word);
            number += 1;
        }
    }
    assert_eq!(words, WORDS.concat());
}

/// The name of an event, and the word in it if it brings one.
fn parts(event: &str) -> (String, String) {
    let field = |name| {
        event
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
    };
    let data: Value = serde_json::from_str(field("data: ")).expect("an event of JSON");
    let word = data["delta"]["text"].as_str().unwrap_or_default();
    (field("event: ").to_owned(), word.to_owned())
}

fn refused(mux: &Mux) {
    heading(3, "A wrong token is refused before the body is read");
    let mut client = mux.client();
    let wrong = [
        ("authorization", "Bearer a-guess-by-someone-else"),
        ("content-length", "1000000"),
    ];
    let answer = client.start("POST", MESSAGES, &wrong).answer();
    assert_eq!(answer.status, 401);
    line("status", &paint("33", "401"));
    line("message", &answer.error());
}

fn adopted(mux: &Mux, up: &Upstream) {
    heading(4, "A login replaced on disk is adopted, without a restart");
    let used = || {
        assert_eq!(mux.message().status, 200);
        up.requests().pop().expect("a request").bearer().to_owned()
    };
    line("before", &format!("the vendor sees {}", named(&used())));
    let new = up.login("claude", 8 * 3600);
    login::save(&mux.state(), "claude", &new.claude());
    line(
        "on disk",
        &format!("another login is written: {}", named(&new.access)),
    );
    assert_eq!(used(), new.access);
    line(
        "after",
        &format!("the vendor sees {}", good(&named(&new.access))),
    );
}

/// Goes on serving, and shows the log, until a signal.
fn serve(mux: &Mux, over: &AtomicBool) {
    let host = format!("http://{}", mux.addr);
    heading(
        5,
        "It goes on serving: point a client at it (Ctrl-C ends it)",
    );
    println!("\nANTHROPIC_BASE_URL={host}/claude ANTHROPIC_AUTH_TOKEN={TOKEN} claude");
    println!(
        "AIMUX_TOKEN={TOKEN} codex -c model_provider=aimux -c 'model_providers.aimux={{name=\"ai-mux\", \
         base_url=\"{host}/chatgpt/v1\", env_key=\"AIMUX_TOKEN\", wire_api=\"responses\", supports_websockets=false}}'\n"
    );
    let mut shown = mux.log().len();
    while !over.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(100));
        let log = mux.log();
        print!("{}", dim(&log[shown..]));
        let _ = io::stdout().flush();
        shown = log.len();
    }
}

/// The stand-in's answer: enough of each vendor's interface for its own clients.
fn answer(req: &Request, conn: &mut Conn, sent: &Mutex<Vec<Instant>>) -> io::Result<()> {
    let path = req.head.word(1).split('?').next().unwrap_or_default();
    let body: Value = serde_json::from_slice(&req.body).unwrap_or_default();
    let claude = req.provider() == "claude";
    if path.ends_with("/models") {
        let model = json!({"type": "model", "id": "stand-in", "slug": "stand-in", "display_name": "Stand-in"});
        return conn.json(
            200,
            &json!({"data": [model], "models": [], "has_more": false}),
        );
    }
    if path.ends_with("/count_tokens") {
        return conn.json(200, &json!({"input_tokens": WORDS.len()}));
    }
    if claude && body["stream"] != true {
        return conn.json(
            200,
            &message(json!([{"type": "text", "text": WORDS.concat()}])),
        );
    }
    // Codex's streams have no Content-Type.
    conn.stream(if claude {
        &[("content-type", "text/event-stream")]
    } else {
        &[]
    })?;
    let events = if claude {
        claude_events()
    } else {
        codex_events()
    };
    for event in events {
        if event["delta"]["text"].is_string() || event["delta"].is_string() {
            thread::sleep(PAUSE);
        }
        lock(sent).push(Instant::now());
        let name = event["type"].as_str().unwrap_or_default();
        conn.chunk(format!("event: {name}\ndata: {event}\n\n"))?;
    }
    conn.finish()
}

fn message(content: Value) -> Value {
    let usage = json!({"input_tokens": 1, "output_tokens": WORDS.len()});
    json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in", "content": content,
        "stop_reason": "end_turn", "stop_sequence": null, "usage": usage})
}

fn claude_events() -> Vec<Value> {
    let delta = |word| {
        let text = json!({"type": "text_delta", "text": word});
        json!({"type": "content_block_delta", "index": 0, "delta": text})
    };
    let block = json!({"type": "text", "text": ""});
    let mut events = vec![
        json!({"type": "message_start", "message": message(json!([]))}),
        json!({"type": "content_block_start", "index": 0, "content_block": block}),
    ];
    events.extend(WORDS.map(delta));
    events.extend([
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": WORDS.len()}}),
        json!({"type": "message_stop"}),
    ]);
    events
}

fn codex_events() -> Vec<Value> {
    let item = |text: &str| {
        let content = json!([{"type": "output_text", "text": text, "annotations": []}]);
        json!({"type": "message", "id": "item_1", "role": "assistant", "content": content})
    };
    let usage =
        json!({"input_tokens": 1, "output_tokens": WORDS.len(), "total_tokens": 1 + WORDS.len()});
    let response = json!({"id": "resp_1", "model": "stand-in", "usage": usage, "output": [item(&WORDS.concat())]});
    let mut events = vec![
        json!({"type": "response.created", "response": {"id": "resp_1"}}),
        json!({"type": "response.output_item.added", "output_index": 0, "item": item("")}),
    ];
    events.extend(WORDS.map(|word| {
        json!({"type": "response.output_text.delta", "item_id": "item_1", "output_index": 0, "delta": word})
    }));
    events.extend([
        json!({"type": "response.output_item.done", "output_index": 0, "item": item(&WORDS.concat())}),
        json!({"type": "response.completed", "response": response}),
    ]);
    events
}
