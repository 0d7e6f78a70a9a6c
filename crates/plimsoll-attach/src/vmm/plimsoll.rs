//! plimsoll's own VMM. Its configuration comes over standard input and its memory is its pager's: there is nothing to
//! find, and nothing may be taken through the kernel behind the pager's back.

use super::Claim;
use crate::argv::Options;
use crate::rungs::Hazard;

pub(super) fn claim(_: &Options<'_>) -> Claim {
    Claim { hazards: vec![Hazard::OwnPager], ..Claim::default() }
}
