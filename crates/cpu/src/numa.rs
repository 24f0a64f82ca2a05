//! Memory nodes of a machine: its cores read what lies near them faster than what lies at other sockets.
//!
//! Threads are bound to the nodes, in numbers like their cores, and of every matrix a node's threads take the same part of the rows
//! (`weight_pieces` in [`crate::pool`]). A system puts a page where the thread runs that touches it first, a file's page, too: so weights
//! read from disk by a first pass lie where they are used from then on, and no page is copied. Where there is one node, nothing is bound.

use std::ops::Range;
use std::path::Path;

/// The nodes whose cores this process may use, and the threads that run on each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes {
    /// Cores of each; none where there is one node.
    cores: Vec<Vec<usize>>,
    /// Threads of node `k`: `bounds[k]..bounds[k + 1]`.
    bounds: Vec<usize>,
}

impl Nodes {
    /// The nodes of this machine for so many threads.
    pub(crate) fn of_machine(threads: usize) -> Self {
        Nodes::new(cores(Path::new("/sys/devices/system/node"), &system::allowed()), threads)
    }

    /// Nodes of some cores.
    pub(crate) fn new(mut cores: Vec<Vec<usize>>, threads: usize) -> Self {
        cores.retain(|cores| !cores.is_empty());
        if cores.len() < 2 || threads < 2 {
            return Nodes::default();
        }
        let all: usize = cores.iter().map(Vec::len).sum();
        let mut bounds = vec![0];
        let mut before = 0;
        for cores in &cores {
            before += cores.len();
            bounds.push((threads * before + all / 2) / all);
        }
        Nodes { cores, bounds }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.cores.len().max(1)
    }

    /// The node of a thread.
    pub(crate) fn of(&self, thread: usize) -> usize {
        self.bounds.iter().skip(1).position(|&end| thread < end).unwrap_or(0)
    }

    /// Threads of a node.
    pub(crate) fn threads(&self, node: usize) -> usize {
        self.bounds.get(node + 1).map_or(0, |end| end - self.bounds[node])
    }

    /// A node's part of so many blocks of rows of a matrix.
    pub(crate) fn part(&self, node: usize, blocks: usize) -> Range<usize> {
        match (self.bounds.get(node + 1), self.bounds.last()) {
            (Some(end), Some(all)) => blocks * self.bounds[node] / all..blocks * end / all,
            _ => 0..blocks,
        }
    }

    /// Binds the calling thread, the `thread`th, to the cores of its node. A system that does not let us is as if there was one node.
    pub(crate) fn bind(&self, thread: usize) {
        if let Some(cores) = self.cores.get(self.of(thread)) {
            system::bind(cores);
        }
    }
}

/// The cores of each node below a folder of the system, of those that are allowed; none if it does not say.
fn cores(folder: &Path, allowed: &[usize]) -> Vec<Vec<usize>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut nodes: Vec<(usize, Vec<usize>)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let list = std::fs::read_to_string(entry.path().join("cpulist")).ok()?;
            Some((number, allowed.iter().copied().filter(|&core| listed(&list, core)).collect()))
        })
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, cores)| cores).collect()
}

/// Whether a list as `0-3,8,10-11` has a number.
fn listed(list: &str, number: usize) -> bool {
    list.trim().split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse(), last.parse()), (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

#[cfg(target_os = "linux")]
mod system {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    /// The cores that this process may use.
    pub(super) fn allowed() -> Vec<usize> {
        sched_getaffinity(None)
            .map_or(Vec::new(), |set| (0..CpuSet::MAX_CPU).filter(|&i| set.is_set(i)).collect())
    }

    pub(super) fn bind(cores: &[usize]) {
        let mut set = CpuSet::new();
        cores.iter().for_each(|&core| set.set(core));
        let _ = sched_setaffinity(None, &set);
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(super) fn bind(_: &[usize]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_system_are_read() {
        let of = |list: &str| (0..16).filter(|&i| listed(list, i)).collect::<Vec<_>>();
        assert_eq!(of("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert!(of("").is_empty());
        assert_eq!(of("x,3-,-4,5-2,7"), [7]);
    }

    #[test]
    fn nodes_have_the_cores_that_are_allowed() {
        let folder = tempfile::tempdir().unwrap();
        for (node, list) in [("node1", "2-3,6-7"), ("node0", "0-1,4-5"), ("node10", ""), ("possible", "0-7")]
        {
            std::fs::create_dir(folder.path().join(node)).unwrap();
            std::fs::write(folder.path().join(node).join("cpulist"), list).unwrap();
        }
        assert_eq!(cores(folder.path(), &[0, 1, 2, 4, 6, 7]), [vec![0, 1, 4], vec![2, 6, 7], vec![]]);
        assert_eq!(cores(&folder.path().join("none"), &[0]), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn threads_and_rows_are_split_like_cores() {
        let nodes = Nodes::new(vec![(0..24).collect(), Vec::new(), (24..32).collect()], 16);
        assert_eq!((nodes.count(), nodes.threads(0), nodes.threads(1)), (2, 12, 4));
        assert_eq!([0, 11, 12, 15].map(|i| nodes.of(i)), [0, 0, 1, 1]);
        assert_eq!((nodes.part(0, 100), nodes.part(1, 100)), (0..75, 75..100));
        // One node, or one thread: nothing to split.
        for one in [Nodes::new(vec![vec![0, 1]], 2), Nodes::new(vec![vec![0], vec![1]], 1), Nodes::default()]
        {
            assert_eq!((one.count(), one.of(1), one.part(0, 9)), (1, 0, 0..9));
            one.bind(0);
        }
    }
    #[test]
    #[cfg(target_os = "linux")]
    fn threads_are_bound_to_the_cores_of_their_node() {
        let &[first, .., last] = &system::allowed()[..] else { return };
        let nodes = Nodes::new(vec![vec![first], vec![last]], 2);
        for (thread, core) in [(0, first), (1, last)] {
            let nodes = nodes.clone();
            let bound = std::thread::spawn(move || {
                nodes.bind(thread);
                system::allowed()
            });
            assert_eq!(bound.join().unwrap(), [core]);
        }
    }
}
