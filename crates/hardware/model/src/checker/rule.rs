//! Rules of an architecture, as data.

use std::fmt;

/// How sure it is that the architecture asks for something.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Certainty {
    /// The specification says so, or several independent drivers rely on it.
    A,
    /// One driver or one hardware erratum relies on it.
    B,
    /// A careful guess.
    C,
}

/// One rule: a change that software makes, and the commands that it needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// `amd-vi/unmap`: stable, for suppressions and `--explain`.
    pub id: &'static str,
    /// The change: `a page is unmapped`.
    pub change: &'static str,
    /// What it needs before software may rely on it.
    pub needs: &'static str,
    /// What happens else, for people.
    pub consequence: &'static str,
    /// Where the specification says it.
    pub section: &'static str,
    /// How sure that is.
    pub certainty: Certainty,
    /// Software may also live with what happens: it is told on request alone.
    pub tolerable: bool,
}

impl Rule {
    /// Whether breaking it is a mistake without doubt.
    pub fn is_strict(&self) -> bool {
        self.certainty <= Certainty::B && !self.tolerable
    }
}

impl fmt::Display for Certainty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "when {}: {} ({})", self.change, self.needs, self.section)
    }
}
