//! What a running process holds, and that it gives it back.

use super::http::PATIENCE;
use super::mux::Mux;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Memory that an allocator may keep for the next time, in KiB.
const KEPT_MEMORY: usize = 16 << 10;

#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub descriptors: usize,
    pub threads: usize,
    /// KiB.
    pub resident: usize,
}

impl Mux {
    pub fn footprint(&self) -> Footprint {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid()));
        Footprint {
            descriptors: descriptors.expect("its descriptors").count(),
            threads: self.status("Threads:"),
            resident: self.status("VmRSS:"),
        }
    }

    /// The most memory that it ever had resident, in bytes.
    pub fn peak_memory(&self) -> usize {
        self.status("VmHWM:") << 10
    }

    /// What it has used of a processor so far, in hundredths of a second.
    pub fn processor_time(&self) -> u64 {
        processor_time(&self.pid().to_string())
    }

    /// What it has read so far, in bytes, whether from files or by read(2) from sockets (proc_pid_io(5)).
    pub fn bytes_read(&self) -> usize {
        self.number("io", "rchar:")
    }

    fn status(&self, name: &str) -> usize {
        self.number("status", name)
    }

    fn number(&self, file: &str, name: &str) -> usize {
        let path = format!("/proc/{}/{file}", self.pid());
        let status = fs::read_to_string(path).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().next());
        word.and_then(|word| word.parse().ok()).expect("a number")
    }

    /// What it holds once a worker has been used; call it before the trouble.
    pub fn warm_footprint(&self) -> Footprint {
        assert_eq!(self.message().status, 200);
        self.footprint()
    }

    /// Another client is served, and what the trouble took is given back, but for the threads of `kept` workers that
    /// were not used before, and an idle connection to upstream for each.
    pub fn assert_recovered(&self, before: Footprint, kept: usize) {
        assert_eq!(self.message().status, 200, "another client is served");
        self.assert_settled(before, kept);
    }

    pub fn assert_settled(&self, before: Footprint, kept: usize) {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let now = self.footprint();
            let back = now.descriptors <= before.descriptors + kept
                && now.threads <= before.threads + kept
                && now.resident <= before.resident + KEPT_MEMORY;
            if back {
                return;
            }
            let late = Instant::now() > deadline;
            assert!(!late, "{now:?} are left of the trouble, {before:?} before");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Changes the limit of its descriptors while it runs; returns the old one. Only Linux can, and the demo is
    /// built elsewhere, too.
    #[cfg(target_os = "linux")]
    pub fn limit_descriptors(&self, limit: u64) -> u64 {
        use rustix::process::{Pid, prlimit};
        let new = Rlimit {
            current: Some(limit),
            maximum: getrlimit(Resource::Nofile).maximum, // It has inherited ours.
        };
        let old = prlimit(Pid::from_raw(self.pid() as i32), Resource::Nofile, new);
        old.expect("limit its descriptors")
            .current
            .unwrap_or(u64::MAX)
    }
}

/// What the calling thread has used of a processor so far, in hundredths of a second.
pub fn own_processor_time() -> u64 {
    processor_time("thread-self")
}

/// The times of a process or a thread, named as in /proc (proc_pid_stat(5)).
fn processor_time(of: &str) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{of}/stat")).expect("its state");
    let (_, numbers) = stat.rsplit_once(") ").expect("a name in brackets");
    let used = numbers.split(' ').skip(11).take(2);
    used.map(|ticks| ticks.parse::<u64>().expect("a number"))
        .sum()
}

/// Raises the limit of this test's own descriptors.
pub fn need_descriptors(count: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        let new = Rlimit {
            current: Some(count),
            maximum,
        };
        setrlimit(Resource::Nofile, new).expect("raise the limit of descriptors");
    }
}
