//! Defects that tests put in on purpose, to see that the checks find them.

/// One defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Commits do not look whether what is reserved on a node has changed since.
    NoAllocationGuard,
    /// Commits do not look whether an instance has changed since: the later of two changes undoes the earlier.
    NoInstanceGuard,
    /// Commits of reconcilers do not look whether their server still leads.
    NoLeaderGuard,
    /// Placement forgets to tell the ports of an instance where it is.
    NoPortWrites,
    /// Addresses are not given back.
    KeepAddresses,
    /// The compute driver says that it removed a guest, and did not.
    LeakGuests,
    /// The image store says that it removed an image, and did not.
    LeakImages,
    /// The compute driver starts a guest also on the next node.
    StartTwice,
    /// Guests are started elsewhere at the moment when the lease of their node has ended.
    NoFencingMargin,
    /// Guests go on when the lease of their node has ended.
    NoFence,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::NoAllocationGuard,
        Self::NoInstanceGuard,
        Self::NoLeaderGuard,
        Self::NoPortWrites,
        Self::KeepAddresses,
        Self::LeakGuests,
        Self::LeakImages,
        Self::StartTwice,
        Self::NoFencingMargin,
        Self::NoFence,
    ];

    /// Its name on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoAllocationGuard => "no-allocation-guard",
            Self::NoInstanceGuard => "no-instance-guard",
            Self::NoLeaderGuard => "no-leader-guard",
            Self::NoPortWrites => "no-port-writes",
            Self::KeepAddresses => "keep-addresses",
            Self::LeakGuests => "leak-guests",
            Self::LeakImages => "leak-images",
            Self::StartTwice => "start-twice",
            Self::NoFencingMargin => "no-fencing-margin",
            Self::NoFence => "no-fence",
        }
    }
}
