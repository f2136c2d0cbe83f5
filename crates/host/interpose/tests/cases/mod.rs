//! The cases.

use crate::support::Case;

mod descriptors;
mod launch;
mod memory;
mod nodes;
mod processes;
mod texts;

pub(crate) const ALL: &[Case] = &[
    launch::EXIT_CODES,
    launch::NO_PROGRAM,
    launch::SCRIPT,
    launch::NESTED,
    launch::TRACE,
    launch::DEFECT,
    nodes::OPENS_AND_STATS,
    nodes::PATHS,
    nodes::ERRORS,
    nodes::LINKS_OF_THE_HOST,
    descriptors::IOCTL,
    descriptors::TRANSFERS,
    descriptors::COPIES,
    descriptors::PASSED,
    descriptors::RELEASE,
    descriptors::SHARED_INODE,
    descriptors::MAPPED,
    descriptors::QUEUE_FILE,
    descriptors::EVENTFDS,
    descriptors::EVENTFDS_MADE,
    texts::ATTRIBUTES,
    texts::REDIRECTED,
    texts::FAIL_NTH,
    texts::STATUS,
    memory::EXEC,
    memory::SPACES,
    memory::ARGUMENTS,
    processes::THREADS,
    processes::INTERRUPTED,
    processes::OWN_FILTER,
    processes::VFORK,
    processes::DAEMON,
    processes::CLIENT_KILLED,
    processes::SUPERVISOR_KILLED,
    processes::KILLED_ANY_TIME,
    processes::OTHER_ABIS,
    processes::SIGNALS,
];
