//! Kernels in which joined sockets lose data or panic, by their version.

use aya::util::KernelVersion;

/// The oldest with everything that the engine relies on: a socket leaves the maps when it is closed and not before
/// (`sock_map_destroy`), so that what was passed can be read after the last FIN.
const OLDEST: [u8; 3] = [6, 1, 0];

/// CVE-2025-38165 (a panic when a socket is closed while the kernel sends for it), by branch: the first version without it.
const FIXED: [[u8; 3]; 4] = [[6, 1, 142], [6, 6, 94], [6, 12, 34], [6, 15, 3]];

/// Why the running kernel is not to be tried; `None`: nothing is known against it.
///
/// aya reads the version that Debian and Ubuntu build from, not the name they give it. Other distributions mend kernels
/// without raising the version: there this withholds the engine though it need not.
pub fn known_bug() -> Option<String> {
    match KernelVersion::current() {
        Ok(version) => against(version),
        Err(error) => Some(format!("the kernel's version is not known: {error}")),
    }
}

fn against(version: KernelVersion) -> Option<String> {
    let of = |[major, minor, patch]: [u8; 3]| KernelVersion::new(major, minor, u16::from(patch));
    if version < of(OLDEST) {
        return Some(format!(
            "Linux {version} is older than 6.1: sockets leave the maps before their last bytes are read"
        ));
    }
    let branch = |[major, minor, _]: [u8; 3]| of([major, minor, 0]);
    let next = |[major, minor, _]: [u8; 3]| of([major, minor + 1, 0]);
    let mended = FIXED.iter().any(|&fixed| version >= branch(fixed) && version < next(fixed) && version >= of(fixed));
    let never_had_it = version >= of([6, 16, 0]);
    (!mended && !never_had_it).then(|| {
        format!("Linux {version} has CVE-2025-38165, fixed in 6.1.142, 6.6.94, 6.12.34, 6.15.3 and 6.16 (a distribution may have mended it without saying so)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_tried_when_its_branch_is_mended_or_new_enough() {
        let bad = |major, minor, patch| against(KernelVersion::new(major, minor, patch)).is_some();
        assert!(
            [(5, 15, 200), (6, 1, 141), (6, 2, 0), (6, 6, 93), (6, 14, 11), (6, 15, 2)].map(|(a, b, c)| bad(a, b, c))
                == [true; 6]
        );
        assert!(
            [(6, 1, 142), (6, 6, 94), (6, 12, 34), (6, 15, 3), (6, 16, 0), (7, 0, 0)].map(|(a, b, c)| bad(a, b, c))
                == [false; 6]
        );
    }
}
