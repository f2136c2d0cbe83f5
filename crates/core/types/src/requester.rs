//! Who issues a request: requester ids, their PCI spelling, and PASIDs.

use core::fmt;
use core::str::FromStr;

/// A PCI requester id: bus, device and function as a transaction carries them
/// (bus 15:8, device 7:3, function 2:0). AMD calls it DeviceID, VT-d source-id, Arm StreamID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct RequesterId(u16);

impl RequesterId {
    /// From the 16 bits of a transaction.
    pub const fn new(value: u16) -> Self {
        Self(value)
    }

    /// The 16 bits of a transaction.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Bus number.
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Device number on the bus, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// Function number in the device, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 7
    }
}

impl fmt::Display for RequesterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{:x}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for RequesterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequesterId({self})")
    }
}

/// A PCI function in its segment, spelled as Linux spells it: `0000:01:00.0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bdf {
    /// PCI segment group ("domain" in sysfs).
    pub segment: u16,
    /// Bus, device, function.
    pub requester: RequesterId,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.segment, self.requester)
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not a PCI address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidBdf;

impl fmt::Display for InvalidBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a PCI address is written SEGMENT:BUS:DEVICE.FUNCTION, like 0000:01:00.0")
    }
}

impl core::error::Error for InvalidBdf {}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    /// `[ssss:]bb:dd.f`, hexadecimal, in the fixed widths that Linux prints.
    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        let hex = |part: &str, width: usize| {
            let fits = part.len() == width && part.bytes().all(|b| b.is_ascii_hexdigit());
            if fits {
                u16::from_str_radix(part, 16).map_err(|_| InvalidBdf)
            } else {
                Err(InvalidBdf)
            }
        };
        let (segment, rest) = match text.split(':').count() {
            2 => ("0000", text),
            3 => text.split_once(':').ok_or(InvalidBdf)?,
            _ => return Err(InvalidBdf),
        };
        let (bus, devfn) = rest.split_once(':').ok_or(InvalidBdf)?;
        let (device, function) = devfn.split_once('.').ok_or(InvalidBdf)?;
        let (device, function) = (hex(device, 2)?, hex(function, 1)?);
        if device > 0x1f || function > 7 {
            return Err(InvalidBdf);
        }
        Ok(Self {
            segment: hex(segment, 4)?,
            requester: RequesterId::new(hex(bus, 2)? << 8 | device << 3 | function),
        })
    }
}

/// A process address space id: 20 bits (PCIe Base 5.0 6.20).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pasid(u32);

impl Pasid {
    /// PASID 0: in Linux's attach interfaces, the requests without a PASID.
    pub const NONE: Self = Self(0);

    /// `None` when `value` needs more than 20 bits.
    pub const fn new(value: u32) -> Option<Self> {
        if value < 1 << 20 { Some(Self(value)) } else { None }
    }

    /// The number, below 2^20.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pasid({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn a_bdf_reads_as_linux_prints_it() {
        let bdf: Bdf = "0000:01:1f.7".parse().unwrap();
        assert_eq!(bdf.requester, RequesterId::new(0x01ff));
        assert_eq!(bdf.to_string(), "0000:01:1f.7");
        assert_eq!("01:1f.7".parse(), Ok(bdf));
    }

    #[test]
    fn a_bdf_out_of_range_is_refused() {
        for text in ["", "1", "0000:01:20.0", "0000:01:00.8", "0000:1:00.0", "0:0:0:0.0", "+1:00.0"]
        {
            assert_eq!(text.parse::<Bdf>(), Err(InvalidBdf), "{text}");
        }
    }
}
