//! What a guest is to be like.
use crate::disk::Disk;
use crate::protocol::{Command, PARAMETER};
use plimsoll_guest::content::Mix;
use plimsoll_sys::process::{GroupId, UserId};
use plimsoll_types::ByteCount;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

/// How long a guest may take to boot: 3 s where nothing else runs, and much else may run.
const BOOT_PATIENCE: Duration = Duration::from_secs(90);

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's own translator: everywhere, slowly.
    Tcg,
    /// KVM, where it can run a kernel at speed.
    Kvm,
}

/// What a piece of guest RAM is to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A shared memfd, as vhost-user needs it.
    Memfd,
}

/// A piece of guest RAM, a NUMA node of the guest's if there is more than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Whole MiB.
    pub size: ByteCount,
    /// What it is to the host.
    pub backing: Backing,
}

/// Whether QEMU offers guest RAM to KSM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// It does, which is its default.
    Offered,
    /// It does not (`mem-merge=off`).
    Off,
}

/// What a guest is to be like. Start from [`Options::new`] and change what matters.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its RAM: at least one piece.
    pub nodes: Vec<Node>,
    /// Processors.
    pub cpus: NonZeroU32,
    /// What executes it.
    pub accel: Accel,
    /// Whether its RAM is offered to KSM.
    pub merge: Merge,
    /// Decides on what its pages contain.
    pub seed: u64,
    /// What kinds of pages it has.
    pub mix: Mix,
    /// What it does from the start, in this order. It has started when that is done, or under way where it has no end.
    pub work: Vec<Command>,
    /// Its disk.
    pub disk: Option<Arc<Disk>>,
    /// Whose process QEMU is; otherwise the caller's. Under libvirt it is always libvirt's user's.
    pub user: Option<(UserId, GroupId)>,
    /// Devices (`-device` of QEMU); a balloon called `balloon0` by default. libvirt adds its own balloon instead.
    pub devices: Vec<String>,
    /// Further arguments of QEMU. libvirt does not get them.
    pub arguments: Vec<String>,
    /// Further words on the kernel's command line.
    pub parameters: Vec<String>,
    /// How long it may take to boot, and as long again for its first work.
    pub patience: Duration,
}

impl Options {
    /// A guest with so much private anonymous RAM, one processor, a balloon, and nothing to do.
    pub fn new(memory: ByteCount) -> Self {
        Self {
            nodes: vec![Node { size: memory, backing: Backing::Anonymous }],
            cpus: NonZeroU32::MIN,
            accel: Accel::Tcg,
            merge: Merge::Offered,
            seed: 1,
            mix: Mix::default(),
            work: Vec::new(),
            disk: None,
            user: None,
            devices: vec!["virtio-balloon-pci,id=balloon0".to_owned()],
            arguments: Vec::new(),
            parameters: Vec::new(),
            patience: BOOT_PATIENCE,
        }
    }

    /// All its RAM.
    pub fn memory(&self) -> ByteCount {
        self.nodes.iter().map(|node| node.size).sum()
    }

    /// The kernel's command line.
    pub(crate) fn command_line(&self) -> String {
        // A panic is to end the machine, and memory added later to be used. Emulated clocks fail the kernel's tests.
        let mut line = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable".to_owned();
        if self.accel == Accel::Tcg {
            line += " no_timer_check tsc=unstable";
        }
        for word in &self.parameters {
            line += &format!(" {word}");
        }
        let disk = self.disk.as_ref().map_or(0, |disk| disk.seed());
        let work: Vec<String> =
            self.work.iter().map(|command| command.to_string().replace(' ', ":")).collect();
        let parameters = [
            ("seed", self.seed.to_string()),
            ("disk", disk.to_string()),
            ("mix", self.mix.to_string()),
            ("work", work.join(",")),
        ];
        for (name, value) in parameters {
            line += &format!(" {PARAMETER}{name}={value}");
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_one_word_of_the_command_line() {
        let mut options = Options::new(ByteCount::mib(256));
        options.work =
            vec![Command::Alloc { pages: 9 }, Command::Hot { pages: 3, per_second: 50 }, Command::Sweep];
        let line = options.command_line();
        assert!(line.ends_with(" plimsoll.work=alloc:9,hot:3:50,sweep"), "{line}");
        assert!(line.contains(" plimsoll.mix=zero=25,dup=20,text=45,random=10 "), "{line}");
    }
}
