//! Everything about a run before it starts.

use super::mux::Mux;
use super::upstream::{Shared, Upstream};
use super::{Authority, Folder, PATIENCE, TOKEN, Value, binary, json, login};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

pub struct Setup {
    pub folder: Folder,
    pub config: Value,
    pub upstreams: Vec<Arc<Shared>>,
    pub authority: Option<Authority>,
    envs: Vec<(String, String)>,
    user: Option<u32>,
    shell: Option<String>,
}

impl Setup {
    /// One user, and both providers on `upstream`, without a login.
    pub fn bare(upstream: &Upstream) -> Setup {
        let folder = Folder::new();
        let state = folder.0.join("state");
        fs::create_dir(&state).expect("make the state folder");
        upstream.secret(TOKEN);
        let config = json!({
            "listen": "127.0.0.1:0",
            "state_dir": state,
            "providers": [upstream.provider("claude"), upstream.provider("chatgpt")],
            "users": [{"name": "alice", "token": TOKEN}],
        });
        Setup {
            folder,
            config,
            upstreams: vec![upstream.shared.clone()],
            authority: None,
            envs: Vec::new(),
            user: None,
            shell: None,
        }
    }

    /// The same with a good login of each provider.
    pub fn new(upstream: &Upstream) -> Setup {
        let mut setup = Setup::bare(upstream);
        for provider in ["claude", "chatgpt"] {
            let login = upstream.login(provider, 3600);
            setup = setup.save(provider, &login.file(provider));
        }
        setup
    }

    /// With another upstream, whose secrets no log may hold either.
    pub fn beside(mut self, upstream: &Upstream) -> Setup {
        self.upstreams.push(upstream.shared.clone());
        self
    }

    pub fn state(&self) -> PathBuf {
        self.folder.0.join("state")
    }

    /// Sets one field of the configuration; null takes it out.
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Setup {
        let fields = self.config.as_object_mut().expect("an object");
        match value.into() {
            Value::Null => fields.remove(field),
            value => fields.insert(field.to_owned(), value),
        };
        self
    }

    /// Sets one key of a provider, 0 for Claude and 1 for ChatGPT.
    pub fn provider(mut self, number: usize, key: &str, value: impl Into<Value>) -> Setup {
        self.config["providers"][number][key] = value.into();
        self
    }

    /// Writes a login before the start.
    pub fn save(self, provider: &str, file: &Value) -> Setup {
        login::save(&self.state(), provider, file);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Setup {
        self.envs.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Puts a file into the folder of this run and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.folder.0.join(name);
        fs::write(&path, content).expect("write a file");
        path.to_str().expect("a path of text").to_owned()
    }

    /// Listens with the certificate of `authority`.
    pub fn tls(mut self, authority: &Authority) -> Setup {
        self.authority = Some(authority.clone());
        let cert = self.write("cert.pem", &authority.cert_pem);
        let key = self.write("key.pem", &authority.key_pem);
        self.set(
            "tls",
            json!({"enabled": true, "cert_path": cert, "key_path": key}),
        )
    }

    /// Runs as a user whom the permissions of files hold, even when the tests run as root.
    pub fn unprivileged(self) -> Setup {
        self.run_as(NOBODY)
    }

    /// The same, as a certain user; without root, as whoever runs the tests.
    pub fn run_as(mut self, user: u32) -> Setup {
        self.user = Some(user);
        self
    }

    /// Has a shell start it, by a script that ends in `exec "$@"`: for limits and redirections.
    pub fn shell(mut self, script: &str) -> Setup {
        self.shell = Some(script.to_owned());
        self
    }

    fn command(&self) -> Command {
        let root = fs::metadata(&self.folder.0).expect("a folder").uid() == 0;
        let mut command = if let Some(user) = self.user.filter(|_| root) {
            // A copy: the folder that cargo builds in may be closed to this user. Made by another process: were it
            // open for writing here, a fork by another test could hold it open, and it could not be run.
            let copy = self.folder.0.join("ai-mux");
            let copied = Command::new("cp").arg(binary()).arg(&copy).status();
            assert!(copied.expect("run cp").success(), "copy the binary");
            hand_over(&self.folder.0, user).expect("hand the folder over");
            let mut command = Command::new(copy);
            command.uid(user).gid(user);
            command
        } else if let Some(script) = &self.shell {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script, "sh"]).arg(binary());
            command
        } else {
            Command::new(binary())
        };
        command.env_clear().env("HOME", &self.folder.0);
        // Where a script's own programs are, strace say, is known to whoever looked for them.
        command.envs(env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.envs.iter().cloned());
        command
    }

    fn spawn(self) -> Mux {
        let text = serde_yaml::to_string(&self.config).expect("YAML");
        let path = self.write("config.yaml", &text);
        let mut command = self.command();
        Mux::spawn(command.arg("--config").arg(path), text, self)
    }

    /// Starts it and waits until it listens.
    pub fn start(self) -> Mux {
        let mut mux = self.spawn();
        mux.wait_log("listening on ");
        mux.addr = mux.addrs()[0];
        mux
    }

    /// Starts it when its log may be too quiet to say where it listens.
    pub fn start_unheard(self) -> Mux {
        let addr = free_address();
        let mut mux = self.set("listen", addr.to_string()).spawn();
        mux.addr = addr;
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(addr).is_err() {
            assert!(Instant::now() < deadline, "it does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        mux
    }

    /// Starts it when it must refuse to: its exit code and what it said.
    pub fn refused(self) -> (i32, String) {
        let mut mux = self.spawn();
        (mux.wait_exit(), mux.whole_log())
    }
}

/// Where nobody listens, below the ports that the kernel gives out by itself: one of those might be another test's
/// before it is used. It is not tried by listening: a process that another test forks meanwhile would go on doing so.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let ports = (0..12_000).map(|_| {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        20_000 + (std::process::id() * 8 + next) % 12_000
    });
    let addrs = ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port as u16)));
    let mut free = addrs.filter(|addr| TcpStream::connect(addr).is_err());
    free.next().expect("a free port")
}

pub const NOBODY: u32 = 65534;

/// Gives a folder and everything in it to a user.
fn hand_over(path: &Path, user: u32) -> io::Result<()> {
    chown(path, Some(user), Some(user))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => hand_over(&entry.path(), user)?,
            false => chown(entry.path(), Some(user), Some(user))?,
        }
    }
    Ok(())
}

/// For `Setup::shell`: starts it where one file is mounted over another. Only root can.
pub fn mounting(file: &str, over: &str) -> Option<String> {
    let private = format!("mount --bind {file} {over}");
    let tried = Command::new("unshare")
        .args(["-m", "sh", "-c", &private])
        .status();
    let script = format!("exec unshare -m sh -c '{private} && exec \"$@\"' sh \"$@\"");
    tried.is_ok_and(|status| status.success()).then_some(script)
}

/// For `Setup::shell`: starts it under strace, where there is one.
pub fn under_strace(options: &str) -> Option<String> {
    // The other way round: what the test started is ai-mux.
    let strace = format!("strace -D -f -qq {options}");
    let tried = Command::new("sh")
        .args(["-c", &format!("{strace} true")])
        .status();
    tried
        .is_ok_and(|status| status.success())
        .then(|| format!("exec {strace} \"$@\""))
}

/// The library that sets a program's clock, for `LD_PRELOAD`: where there is one, and ai-mux is not static.
pub fn faketime() -> Option<String> {
    let folders = ["x86_64-linux-gnu", "aarch64-linux-gnu", "."];
    let library = folders.map(|folder| format!("/usr/lib/{folder}/faketime/libfaketimeMT.so.1"));
    let library = library.into_iter().find(|path| Path::new(path).exists())?;
    // With this, the dynamic linker only tells what it would load.
    let mut told = Command::new(binary());
    told.arg("--version").env("LD_TRACE_LOADED_OBJECTS", "1");
    let told = told.env("LD_PRELOAD", &library).output().ok()?;
    let loads_it = String::from_utf8_lossy(&told.stdout).contains("faketime");
    loads_it.then_some(library)
}
