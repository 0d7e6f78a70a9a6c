//! What is seen of a VMM that rules ask for.
//!
//! Enters: a process. Leaves: its [`Traits`]: a few small files of /proc, no page table. What cannot be read is empty, which matches a `*` only.
use crate::config::Traits;
use plimsoll_attach::vmm::Vmm;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::program;

/// Looks at the VMM of the machine of a name.
pub(crate) fn traits_of(process: ProcessId, vmm: Vmm, name: &str) -> Traits {
    let user = program::user(process).ok();
    let users = user.into_iter().flat_map(|user| [Some(user.to_string()), user_name(user)]).flatten();
    Traits {
        // As everywhere where it is written for programs.
        vmm: serde_json::to_value(vmm)
            .ok()
            .and_then(|word| word.as_str().map(str::to_owned))
            .unwrap_or_default(),
        name: name.to_owned(),
        command_line: program::arguments(process).unwrap_or_default().join(" "),
        cgroups: program::control_groups(process).unwrap_or_default(),
        users: users.collect(),
    }
}

/// The name of a user of this host's own: directories that others keep are not asked, which may take any time.
fn user_name(user: u32) -> Option<String> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(user)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_seen_as_it_is() {
        let seen = traits_of(ProcessId::own(), Vmm::CloudHypervisor, "web");
        assert_eq!((&*seen.vmm, &*seen.name), ("cloud-hypervisor", "web"));
        assert_eq!(seen.command_line, std::env::args().collect::<Vec<_>>().join(" "));
        assert!(seen.users.contains(&rustix::process::getuid().as_raw().to_string()));
        assert_eq!(user_name(0).as_deref(), Some("root"));
    }
}
