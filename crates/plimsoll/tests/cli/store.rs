//! The keeper under a supervisor that keeps its descriptors, as systemd does: killed, and started again with what was stored.
use super::daemon::{Directory, Machine, exists, manager_of, signal, wait_for_another};
use super::run::{Run, Running, alone, can, wait_until};
use plimsoll_host::control::host_pressure;
use plimsoll_sys::fdpass;
use plimsoll_sys::process::make_inheritable;
use rustix::fs::inotify;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What the daemon itself has.
const OWN: [&str; 6] = ["slot-0", "slot-1", "slot-2", "slot-3", "slot-4", "slot-8"];

/// The same, and the kernel's word of pressure where that is measured.
fn own() -> Vec<&'static str> {
    OWN.into_iter().chain(host_pressure().map(|_| "slot-9")).collect()
}

/// What a supervisor has heard.
#[derive(Default)]
struct Heard {
    stored: BTreeMap<String, OwnedFd>,
    signs_of_life: u32,
}

/// Keeps descriptors by their names.
struct Supervisor {
    place: PathBuf,
    heard: Arc<Mutex<Heard>>,
    listens: Option<JoinHandle<()>>,
}

impl Supervisor {
    fn new(name: &str) -> Self {
        let place = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&place);
        let socket = OwnedFd::from(UnixDatagram::bind(&place).unwrap());
        let heard = Arc::new(Mutex::new(Heard::default()));
        let writes = Arc::clone(&heard);
        let listens = std::thread::spawn(move || {
            let mut bytes = [0; 1000];
            loop {
                let received = fdpass::recv(&socket, &mut bytes, 1).unwrap().unwrap();
                let text = str::from_utf8(&bytes[..received.bytes]).unwrap();
                let said: BTreeMap<&str, &str> =
                    text.lines().map(|line| line.split_once('=').unwrap()).collect();
                let mut heard = writes.lock().unwrap();
                let name = said.get("FDNAME").map(|name| (*name).to_owned());
                if said.contains_key("END") {
                    return;
                } else if said.contains_key("FDSTORE") {
                    assert_eq!(said.get("FDPOLL"), Some(&"0"), "{text}");
                    heard.stored.insert(name.unwrap(), received.descriptors.into_iter().next().unwrap());
                } else if said.contains_key("FDSTOREREMOVE") {
                    heard.stored.remove(&name.unwrap());
                } else if said.contains_key("WATCHDOG") {
                    heard.signs_of_life += 1;
                }
            }
        });
        Self { place, heard, listens: Some(listens) }
    }

    fn stored(&self) -> Vec<String> {
        self.heard.lock().unwrap().stored.keys().cloned().collect()
    }

    /// Starts a daemon with what is stored, from descriptor 3 on. One that has something stored is not told what the host has: that its
    /// machines use most of it is no reason to refuse them.
    fn start(&self, directory: &Directory, more: &[&str]) -> Running {
        let copies: Vec<(String, OwnedFd)> = {
            let heard = self.heard.lock().unwrap();
            // Above what any shell has for itself.
            let copy = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, 400).unwrap();
            heard.stored.iter().map(|(name, fd)| (name.clone(), copy(fd))).collect()
        };
        let names: Vec<&str> = copies.iter().map(|(name, _)| &**name).collect();
        let places = copies.iter().zip(3..).map(|((_, fd), at)| format!("{at}<&{0} {0}<&-", fd.as_raw_fd()));
        let places = places.collect::<Vec<_>>().join(" ");
        // The number of a process is known to itself first.
        let covers = if names.is_empty() { "" } else { "mount --bind /dev/null /proc/meminfo;" };
        let script = format!(
            "{covers} export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} WATCHDOG_USEC=200000; exec \"$0\" \"$@\" {places}",
            names.len(),
            names.join(":"),
        );
        let program = env!("CARGO_BIN_EXE_plimsoll");
        let words = [
            "--mount",
            "bash",
            "-c",
            &script,
            program,
            "daemon",
            "--budget",
            "64M",
            "--directory",
            directory.text(),
        ];
        copies.iter().for_each(|(_, fd)| make_inheritable(fd).unwrap());
        Run::of("unshare".as_ref(), &[&words, more].concat()).with("NOTIFY_SOCKET", &self.place).start()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if let Ok(socket) = UnixDatagram::unbound()
            && socket.send_to(b"END=1", &self.place).is_ok()
            && let Some(listens) = self.listens.take()
        {
            let _ = listens.join();
        }
        let _ = std::fs::remove_file(&self.place);
    }
}

#[test]
fn a_keeper_that_was_killed_gets_every_descriptor_back_and_guests_go_on() {
    let _alone = alone();
    if !can("userfaultfd") || !can("root") {
        return;
    }
    let directory = Directory::new("stored");
    let supervisor = Supervisor::new("stores");
    let mut daemon = supervisor.start(&directory, &[]);
    wait_until("its manager serves", || manager_of(&directory).is_some());
    let own = own();
    wait_until("its own descriptors are stored", || supervisor.stored() == own);
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);
    let with_machine = supervisor.stored();
    assert!(with_machine.len() >= own.len() + 6, "{with_machine:?}");
    let mut killed = Vec::new();
    for manager_too in [false, true, false] {
        let manager = manager_of(&directory).unwrap();
        daemon.signal(Signal::KILL);
        if manager_too {
            signal(manager, Signal::KILL);
        } else {
            // It goes on alone, until the next keeper ends it.
            machine.verifies(1000);
        }
        // What its manager says goes on to the same readers.
        killed.push(std::mem::replace(&mut daemon, supervisor.start(&directory, &[])));
        wait_for_another(&directory, manager);
        assert!(!exists(manager), "two managers have the machine");
        // More than the budget holds: each round brings back what the one before has moved out.
        machine.verifies(30_000);
        wait_until("the same is stored as before", || supervisor.stored() == with_machine);
    }
    // A new program of the same process knows what is stored, too.
    let manager = manager_of(&directory).unwrap();
    daemon.signal(Signal::USR2);
    wait_for_another(&directory, manager);
    machine.verifies(1000);
    let signs_of_life = supervisor.heard.lock().unwrap().signs_of_life;
    wait_until("it says that it lives", || supervisor.heard.lock().unwrap().signs_of_life > signs_of_life);
    machine.finish();
    wait_until("nothing of the machine is stored", || supervisor.stored() == own);
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    wait_until("nothing is stored", || supervisor.stored().is_empty());
    for killed in killed {
        killed.wait().expect_nothing_left();
    }
}

#[test]
fn a_disk_tiers_file_is_waited_for_while_a_supervisor_has_its_lock_and_refused_where_that_stays() {
    if !can("userfaultfd") || !can("root") {
        return;
    }
    let (directory, folder) = (Directory::new("locked"), tempfile::tempdir().unwrap());
    let (supervisor, path) = (Supervisor::new("locks"), folder.path().join("tier"));
    let disk = ["--disk", path.to_str().unwrap(), "--disk-limit", "8M"];
    // As a manager leaves it that was killed before its tier was entered.
    let leave = || {
        let file = File::create(&path).unwrap();
        file.try_lock().unwrap();
        let copy = file.try_clone().unwrap().into();
        supervisor.heard.lock().unwrap().stored.insert("slot-6".to_owned(), copy);
        file
    };
    let file = leave();
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, &path, inotify::WatchFlags::CLOSE_WRITE).unwrap();
    let daemon = supervisor.start(&directory, &disk);
    // One that has the lock keeps the file open.
    wait_until("its manager has tried in vain", || rustix::io::read(&watch, &mut [0; 64]).is_ok());
    drop(file);
    wait_until("its manager serves", || manager_of(&directory).is_some());
    wait_until("its tier is stored", || supervisor.stored().iter().any(|name| name == "slot-6-1"));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0);
    wait_until("nothing is stored", || supervisor.stored().is_empty());
    let _file = leave();
    let refused = supervisor.start(&directory, &disk).wait();
    refused.expect_code(1);
    assert!(refused.stderr.contains("is in use: give each daemon a file"), "{}", refused.stderr);
}
