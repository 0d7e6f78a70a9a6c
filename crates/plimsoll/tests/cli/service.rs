//! The shipped unit under a systemd of its own: started, crashed in every part, hung, refused to be stopped, stopped.
//!
//! That descriptors come back is known from a supervisor made up for it (`store.rs`); here it is systemd itself that keeps them, with
//! the unit's sandbox around the daemon.
use super::booted::Booted;
use super::daemon::{Machine, ask_at};
use super::run::{alone, can, wait_until};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const UNIT: &str = "plimsoll.service";
const DIRECTORY: &str = "/run/plimsoll";
/// A tier on the disk as well: io_uring within the unit's filter, and its folder the only one that it may write to.
const ENVIRONMENT: &str = "PLIMSOLL_DAEMON=\"--budget 64M --config /etc/plimsoll/plimsoll.toml --disk /var/lib/plimsoll/tier --disk-limit 64M\"\n";
/// Descriptors that a daemon without machines has stored.
const OWN: u32 = 6;
/// So that a keeper that hangs is found while a test waits for it. On a busy machine it may be found without having hung.
const SOONER: &str = "[Service]\nWatchdogSec=8s\n";

/// Pages that a machine has to verify to have gone on: a second where nothing else runs. It uses more than the budget holds, so all of
/// them were stored before.
const MORE: u64 = 2000;

/// The unit, and where it is booted.
struct Service(Booted, PathBuf);

impl Service {
    fn boot() -> Self {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib");
        let folder = std::env::temp_dir().join(format!("plimsoll-service-{}", std::process::id()));
        let booted = Booted::start(&folder, |root, programs| {
            let place = |path: &str| -> std::io::Result<PathBuf> {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap_or(root))?;
                Ok(path)
            };
            symlink(env!("CARGO_BIN_EXE_plimsoll"), programs.join("plimsoll"))?;
            fs::copy(shipped.join(UNIT), place("usr/lib/systemd/system/plimsoll.service")?)?;
            fs::copy(shipped.join("etc/plimsoll.toml"), place("etc/plimsoll/plimsoll.toml")?)?;
            fs::write(place("etc/plimsoll/daemon.env")?, ENVIRONMENT)
        });
        Self(booted.unwrap(), folder)
    }

    fn systemctl(&self, words: &[&str]) {
        let said = self.0.output(&[&["systemctl"], words, &[UNIT]].concat()).unwrap();
        assert!(said.status.success(), "{words:?}: {said:?}\n{}", self.0.journal().unwrap());
    }

    /// Has a keeper that is started from now on found sooner where it hangs.
    fn is_watched_closely(&self) {
        let folder = self.0.path("/etc/trial/plimsoll.service.d");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("sooner.conf"), SOONER).unwrap();
        assert!(self.0.output(&["systemctl", "daemon-reload"]).unwrap().status.success());
    }

    /// Ends it, as the end of this process would, and looks what is left.
    fn leaves_nothing(self) {
        let Self(booted, folder) = self;
        let inside = booted.path("");
        assert!(inside.exists() && folder.exists());
        drop(booted);
        // Its control group goes before the folder, and whatever ran in it before that.
        assert!(!inside.exists() && !folder.exists(), "something is left of {}", folder.display());
    }

    fn property(&self, name: &str) -> String {
        self.0.property(UNIT, name).unwrap()
    }

    fn number(&self, name: &str) -> u32 {
        self.property(name).parse().unwrap()
    }

    /// The process of the manager that answers, as it is numbered inside.
    fn manager(&self) -> Option<u64> {
        ask_at(&self.0.path(DIRECTORY), r#"{"do":"status"}"#)?["status"]["pid"].as_u64()
    }

    fn kill_manager(&self) {
        let manager = self.manager().unwrap().to_string();
        assert!(self.0.output(&["kill", "-KILL", &manager]).unwrap().status.success());
    }

    /// Signals the keeper, which is the unit's main process.
    fn signal(&self, signal: &str) {
        self.systemctl(&["kill", "--kill-whom=main", "--signal", signal]);
    }

    /// Waits for another manager than that, and that the unit is what it was.
    fn goes_on_after(&self, manager: u64, machine: &mut Machine, stored: u32) {
        wait_until("another manager serves", || self.manager().is_some_and(|next| next != manager));
        wait_until("the unit is active", || self.property("ActiveState") == "active");
        machine.verifies(MORE);
        wait_until("as much is stored as before", || self.number("NFileDescriptorStore") == stored);
    }

    /// Has the register be of another version, as the next program that is started finds it.
    fn is_of_version(&self, version: u8) {
        const WRITE: &str = "for file in /proc/$0/fd/*; do case $(readlink $file) in *plimsoll-register*) \
            printf \"\\\\$1\" | dd of=$file bs=1 seek=8 conv=notrunc && exit 0;; esac; done; exit 1";
        let words = ["sh", "-c", WRITE, &self.property("MainPID"), &format!("{version:03o}")];
        let said = self.0.output(&words).unwrap();
        assert!(said.status.success(), "{said:?}");
    }

    fn machine(&self, footprint_bytes: u64) -> Machine {
        let spec = WorkloadSpec { footprint_bytes, ..WorkloadSpec::new(WorkloadKind::Sweep) };
        Machine::by(self.0.command("/usr/bin/plimsoll"), DIRECTORY.as_ref(), &Machine::config(spec))
    }
}

#[test]
fn under_systemd_every_part_may_die_or_hang_and_a_stop_that_cannot_be_is_obeyed_when_it_can() {
    let _alone = alone();
    if !can("kvm") || !can("userfaultfd") || !can("systemd") {
        return;
    }
    let service = Service::boot();
    service.systemctl(&["start"]);
    assert_eq!(service.property("ActiveState"), "active");
    assert_eq!(service.property("StatusText"), "0 machines");
    wait_until("its own descriptors are stored", || service.number("NFileDescriptorStore") >= OWN);
    let own = service.number("NFileDescriptorStore");
    let mut machine = service.machine(80 << 20);
    machine.verifies(MORE);
    wait_until("all of the machine's are stored", || service.number("NFileDescriptorStore") >= own + 6);
    let stored = service.number("NFileDescriptorStore");
    assert_eq!(service.property("OOMPolicy"), "continue");

    let before = service.manager().unwrap();
    let restarts = service.number("NRestarts");
    service.kill_manager();
    service.goes_on_after(before, &mut machine, stored);
    // A new program, with nothing more for systemd to do either.
    let before = service.manager().unwrap();
    service.signal("USR2");
    service.goes_on_after(before, &mut machine, stored);
    assert_eq!(service.number("NRestarts"), restarts);

    for manager_too in [false, true] {
        let (before, restarts) = (service.manager().unwrap(), service.number("NRestarts"));
        service.signal("KILL");
        if manager_too {
            service.kill_manager();
        }
        service.goes_on_after(before, &mut machine, stored);
        assert!(service.number("NRestarts") > restarts, "systemd started no keeper");
    }

    // A program that cannot go on with what there is ends no manager that does.
    let before = service.manager().unwrap();
    service.is_of_version(3);
    service.signal("KILL");
    wait_until("it refuses", || service.0.journal().unwrap().contains("register is of version 3"));
    machine.verifies(MORE);
    assert_eq!(service.manager(), Some(before));
    service.is_of_version(4);
    service.goes_on_after(before, &mut machine, stored);

    // What it uses is more than the budget.
    service.systemctl(&["stop", "--no-block"]);
    wait_until("it refuses", || service.0.journal().unwrap().contains("not stopped: 1 machines run"));
    assert_eq!(service.property("ActiveState"), "deactivating");
    machine.verifies(MORE);
    machine.finish();
    wait_until("it stops when nothing keeps it", || service.property("ActiveState") == "inactive");
    assert_eq!(service.property("Result"), "success");
    assert_eq!(service.number("NFileDescriptorStore"), 0);

    service.is_watched_closely();
    service.systemctl(&["start"]);
    let mut machine = service.machine(24 << 20);
    machine.verifies(MORE);
    let (before, stored) = (service.manager().unwrap(), service.number("NFileDescriptorStore"));
    service.signal("STOP");
    service.goes_on_after(before, &mut machine, stored);
    assert!(service.0.journal().unwrap().contains("Watchdog timeout"), "a keeper that hung was not found");
    service.systemctl(&["stop"]);
    machine.is_given_back();
    machine.verifies(MORE);
    machine.finish();
    let journal = service.0.journal().unwrap();
    assert!(!journal.contains("panicked") && !journal.contains("SIGSYS"), "{journal}");
    service.leaves_nothing();
}
