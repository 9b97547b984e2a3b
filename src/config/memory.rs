//! How much memory this process may use.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The smallest memory limit of the control groups of this process, in bytes. `None` where there is none.
pub(super) fn limit() -> Option<u64> {
    limit_below(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// `membership` is the content of `/proc/self/cgroup`: the group in version 2 has a line that starts with `0::`, the
/// group for memory in version 1 one that names the controller.
fn limit_below(root: &Path, membership: &str) -> Option<u64> {
    let files = membership.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        match (fields.next()?, fields.next()?) {
            ("", group) => Some((root.to_owned(), group, "memory.max")),
            ("memory", group) => Some((root.join("memory"), group, "memory.limit_in_bytes")),
            _ => None,
        }
    });
    // Every group above limits too. A container sees its own group as the root.
    let limits = files.flat_map(|(root, group, file)| {
        let below = PathBuf::from(group.trim_start_matches('/'));
        let groups: Vec<_> = below.ancestors().map(|group| root.join(group).join(file)).collect();
        groups.into_iter().filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, group: &str, file: &str, limit: &str) {
        let directory = root.join(group);
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(directory.join(file), limit).expect("a file");
    }

    #[test]
    fn the_smallest_limit_of_a_group_and_those_above_it_counts() {
        let root = tempfile::tempdir().expect("a directory");
        group(root.path(), "pod", "memory.max", "100\n");
        group(root.path(), "pod/container", "memory.max", "max\n");
        assert_eq!(limit_below(root.path(), "0::/pod/container\n"), Some(100));
        assert_eq!(limit_below(root.path(), "0::/\n"), None);
    }

    #[test]
    fn version_1_names_the_controller() {
        let root = tempfile::tempdir().expect("a directory");
        group(root.path(), "memory/docker/a", "memory.limit_in_bytes", "4096\n");
        assert_eq!(limit_below(root.path(), "5:cpu:/docker/a\n4:memory:/docker/a\n"), Some(4096));
        assert_eq!(limit_below(root.path(), ""), None);
    }
}
