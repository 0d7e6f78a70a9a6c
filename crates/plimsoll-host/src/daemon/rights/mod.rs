//! What the daemon's two processes may do, and how they give up the rest.
//!
//! Enters: a role, and what becomes of a call that is not listed. Leaves: this process with the capabilities and system calls of
//! [`table`], for good. What must never happen: a guest that stalls because a list lacks something.
//!
//! * **What is not listed fails, and kills nobody.** It is as if the kernel had no such call (ENOSYS). Killed, a manager would be
//!   followed by one that makes the same call: a mistake in the list would stall all guests for ever, where an error stops the one thing
//!   that was tried and is told. An attacker who is killed tries again with the next manager; one who is refused has gained as little.
//!   ENOSYS and not EPERM, because C libraries fall back to older calls on that alone, and the next version of one may try a newer call
//!   first. The kernel's log says which call it was (`type=1326`), and [`Filter::Log`] lists all that another system needs.
//! * **A filter is for life, and inherited.** Whatever the keeper gave up, its managers lack, and the program that takes its place in an
//!   upgrade. So the keeper's list is no list of the few calls that its own loop makes: it is what any of them needs, from the
//!   program's first instruction on. A manager adds a shorter list before it reads anything, and goes without what starts programs
//!   where there is no virsh to start.
//! * **The keeper uses no capability.** What it has left is for its managers: a program executed by root has what is permitted.
//! * **What only the beginning needs is done before:** the tmpfs in which stores lie is mounted by the keeper and handed on
//!   ([`STORES`](super::STORES)), so that nobody keeps CAP_SYS_ADMIN for it.
pub mod table;

use plimsoll_sys::rights::{Instruction, RightsError, filter_calls, is_filtered, keep_capabilities};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use table::{Call, GROUPS, KEPT, Only, Whose};
use thiserror::Error;

/// What becomes of a system call that is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// It fails, and the kernel's log says so.
    Refuse,
    /// It is made, and the kernel's log says so: to find out what a system needs.
    Log,
    /// It is made: there is no filter.
    Off,
}

/// Which of the daemon's processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The keeper, and so whatever it starts or becomes.
    Keeper,
    /// A manager that may start virsh.
    Manager,
    /// A manager that starts no program.
    Alone,
}

/// Rights could not be given up. The process must end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GiveUpError {
    /// The kernel refused.
    #[error(transparent)]
    Rights(#[from] RightsError),
    /// The list makes no filter; a mistake of this module.
    #[error("the list of system calls makes no filter")]
    Build(#[from] BackendError),
}

/// Gives up what `role` does not need. Threads started later, and programs, inherit it: call it before there are any.
///
/// # Errors
/// [`GiveUpError`].
pub fn give_up(role: Role, filter: Filter) -> Result<(), GiveUpError> {
    let used = if role == Role::Keeper { table::none() } else { table::set(KEPT) };
    keep_capabilities(used, table::set(KEPT))?;
    if filter != Filter::Off {
        filter_calls(&instructions(role, filter)?)?;
    }
    Ok(())
}

/// The same for a keeper that an earlier program of this process has become. Where that has left it under a filter it keeps to that one:
/// filters would add up with every upgrade, and the kernel takes only so many.
///
/// # Errors
/// [`GiveUpError`].
pub fn give_up_again(filter: Filter) -> Result<(), GiveUpError> {
    give_up(Role::Keeper, if is_filtered()? { Filter::Off } else { filter })
}

impl Role {
    /// Whether calls for `whose` work may be made.
    const fn includes(self, whose: Whose) -> bool {
        match whose {
            Whose::All => true,
            Whose::Starters => !matches!(self, Self::Alone),
            Whose::Keeper => matches!(self, Self::Keeper),
        }
    }
}

fn instructions(role: Role, filter: Filter) -> Result<Vec<Instruction>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut free = Vec::new();
    for call in GROUPS.iter().filter(|group| role.includes(group.whose)).flat_map(|group| group.calls) {
        let listed = rules.entry(call.number).or_default();
        match rules_of(call)? {
            Some(more) => listed.extend(more),
            None => free.push(call.number),
        }
    }
    // One without rules is allowed whatever its arguments are, so also where another group allows some of them only.
    free.into_iter().for_each(|number| drop(rules.insert(number, Vec::new())));
    let refused = match filter {
        Filter::Refuse => SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        Filter::Log | Filter::Off => SeccompAction::Log,
    };
    let program: BpfProgram =
        SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()?;
    let same = program.into_iter().map(|it| Instruction { code: it.code, jt: it.jt, jf: it.jf, k: it.k });
    Ok(same.collect())
}

/// The rules of which one must hold; `None` where the arguments are not looked at.
fn rules_of(call: &Call) -> Result<Option<Vec<SeccompRule>>, BackendError> {
    let rule = |argument, operator, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
    };
    match call.only {
        Only::Any => Ok(None),
        Only::These { argument, values } => {
            let rules =
                values.iter().map(|(_, value)| rule(argument, SeccompCmpOp::Eq, u64::from(*value))).collect();
            Result::map(rules, Some)
        }
        Only::Without { argument, bits: (_, bits) } => {
            let bits = u64::from(bits);
            Ok(Some(vec![rule(argument, SeccompCmpOp::MaskedEq(bits), 0)?]))
        }
    }
}

#[cfg(test)]
mod tests;
