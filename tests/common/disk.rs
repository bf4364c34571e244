//! A file system of its own, where this machine lets us have one.

use super::say;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// Mounted at a folder; of 256 KiB, if its kind has a size.
pub struct Disk(PathBuf);

impl Disk {
    pub fn mount(path: PathBuf, kind: &str) -> Option<Disk> {
        fs::create_dir_all(&path).expect("make a folder");
        let options = ["-t", kind, "-o", "size=256k,mode=700", kind];
        let done = Command::new("mount").args(options).arg(&path).output();
        if done.is_ok_and(|done| done.status.success()) {
            return Some(Disk(path));
        }
        say("SKIPPED: this user may not mount a file system");
        None
    }

    pub fn remount(&self, how: &str) {
        let options = format!("remount,{how}");
        let mut command = Command::new("mount");
        let done = command.args(["-o", &options]).arg(&self.0).status();
        assert!(done.expect("run mount").success(), "remount {how}");
    }

    /// Takes what room is left, but for this many pages.
    pub fn fill(&self, pages: u64) {
        let mut filler = fs::File::create(self.0.join("filler")).expect("make a file");
        while filler.write(&[b'x'; 4096]).is_ok_and(|count| count > 0) {}
        let size = filler.metadata().expect("a file").len();
        filler.set_len(size - pages * 4096).expect("free pages");
    }

    pub fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("remove a file");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
