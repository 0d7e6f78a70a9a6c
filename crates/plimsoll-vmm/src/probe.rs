//! What can run a guest on this host, and why not something better.
//!
//! Enters: `/dev/kvm` and what `/sys/module` says about KVM. Leaves: an [`Accel`], which prints as one line: everything that
//! shows a measurement shows that line first. Paging in software makes every fault several times as dear as paging in
//! hardware, so a number without it means nothing.
use crate::kvm::{self, KvmError};
use plimsoll_linux::explain;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::Path;

/// What runs guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Accel {
    /// KVM.
    Kvm {
        /// How it translates addresses.
        paging: Paging,
        /// The module that does it.
        module: String,
    },
    /// Threads of the VMM's own process.
    InProcess {
        /// Why not KVM.
        because: String,
    },
}

/// How KVM translates guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paging {
    /// Intel's extended page tables.
    Ept,
    /// AMD's nested page tables.
    Npt,
    /// Shadow page tables.
    Software,
    /// The modules' parameters do not say.
    Unknown,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm { paging: Paging::Ept, module } => write!(f, "KVM (EPT, {module})"),
            Self::Kvm { paging: Paging::Npt, module } => write!(f, "KVM (NPT, {module})"),
            Self::Kvm { paging: Paging::Software, module } => write!(f, "KVM (software paging, {module})"),
            Self::Kvm { paging: Paging::Unknown, module } => {
                write!(f, "KVM (kind of paging unknown, {module})")
            }
            Self::InProcess { because } => write!(f, "in-process, because {because}"),
        }
    }
}

/// What would run a machine with one vCPU here and now.
pub fn probe() -> Accel {
    match kvm::check() {
        Ok(()) => describe_kvm(Path::new("/sys/module")),
        Err(error) => not_kvm(&error),
    }
}

pub(crate) fn not_kvm(error: &KvmError) -> Accel {
    Accel::InProcess { because: explain(error) }
}

pub(crate) fn describe_kvm(modules: &Path) -> Accel {
    let enabled = |file: &str| {
        let text = fs::read_to_string(modules.join(file)).unwrap_or_default();
        matches!(text.trim(), "Y" | "1")
    };
    let exists = |module: &str| modules.join(module).is_dir();
    let kvm = |paging, module: &str| Accel::Kvm { paging, module: module.to_owned() };
    if exists("kvm_intel") {
        let paging = if enabled("kvm_intel/parameters/ept") { Paging::Ept } else { Paging::Software };
        return kvm(paging, "kvm_intel");
    }
    if exists("kvm_amd") {
        let paging = if enabled("kvm_amd/parameters/npt") { Paging::Npt } else { Paging::Software };
        return kvm(paging, "kvm_amd");
    }
    if exists("kvm_pvm") {
        return kvm(Paging::Software, "kvm_pvm");
    }
    // Some other vendor module. `tdp_mmu` is on only where the processor walks two stages.
    let paging =
        if exists("kvm") && !enabled("kvm/parameters/tdp_mmu") { Paging::Software } else { Paging::Unknown };
    kvm(paging, "kvm")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(files: &[(&str, &str)]) -> String {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("plimsoll-probe-{}-{count}", std::process::id()));
        for (file, text) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let line = describe_kvm(&root).to_string();
        fs::remove_dir_all(root).unwrap();
        line
    }

    #[test]
    fn the_kind_of_paging_is_read_from_the_modules() {
        let none = ("kvm/parameters/tdp_mmu", "N\n");
        assert_eq!(modules(&[none, ("kvm_intel/parameters/ept", "Y\n")]), "KVM (EPT, kvm_intel)");
        assert_eq!(modules(&[none, ("kvm_intel/parameters/ept", "N\n")]), "KVM (software paging, kvm_intel)");
        assert_eq!(modules(&[none, ("kvm_amd/parameters/npt", "1\n")]), "KVM (NPT, kvm_amd)");
        assert_eq!(modules(&[none, ("kvm_pvm/parameters/force", "N\n")]), "KVM (software paging, kvm_pvm)");
        assert_eq!(modules(&[none]), "KVM (software paging, kvm)");
        let tdp = ("kvm/parameters/tdp_mmu", "Y\n");
        assert_eq!(modules(&[tdp]), "KVM (kind of paging unknown, kvm)");
    }

    #[test]
    fn the_probe_answers_in_one_line() {
        let line = probe().to_string();
        assert!(line.starts_with("KVM (") || line.starts_with("in-process, because "), "{line}");
        assert!(!line.contains('\n'));
    }
}
