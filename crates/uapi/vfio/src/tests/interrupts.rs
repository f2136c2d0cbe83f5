//! Interrupts: from the function through the controller to the eventfd.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lychgate_types::Errno;
use zerocopy::IntoBytes;

use super::client::{MEMORY, TestClient, TestEventFd};
use super::function::*;
use crate::abi::*;

const NONE: u32 = VFIO_IRQ_SET_DATA_NONE;
const BOOL: u32 = VFIO_IRQ_SET_DATA_BOOL;
const EVENTFD: u32 = VFIO_IRQ_SET_DATA_EVENTFD;
const MASK: u32 = VFIO_IRQ_SET_ACTION_MASK;
const UNMASK: u32 = VFIO_IRQ_SET_ACTION_UNMASK;
const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER;

const INTX: u32 = VFIO_PCI_INTX_IRQ_INDEX;
const MSI_INDEX: u32 = VFIO_PCI_MSI_IRQ_INDEX;
const MSIX_INDEX: u32 = VFIO_PCI_MSIX_IRQ_INDEX;
const ERR: u32 = VFIO_PCI_ERR_IRQ_INDEX;
const REQ: u32 = VFIO_PCI_REQ_IRQ_INDEX;

struct Set<'a> {
    bench: &'a Bench,
    client: &'a TestClient,
}

impl Set<'_> {
    fn set(
        &self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &[u8],
    ) -> Result<i32, Errno> {
        let argsz = u32::try_from(size_of::<IrqSet>() + data.len()).unwrap();
        let argument = self.client.argument(&IrqSet { argsz, flags, index, start, count });
        self.client.put(size_of::<IrqSet>() as u64, data);
        self.bench.device.set_irqs(self.client, argument).map_err(|refusal| refusal.errno)
    }

    fn none(&self, action: u32, index: u32, start: u32, count: u32) -> Result<i32, Errno> {
        self.set(NONE | action, index, start, count, &[])
    }

    fn bools(&self, action: u32, index: u32, start: u32, bools: &[u8]) -> Result<i32, Errno> {
        self.set(BOOL | action, index, start, u32::try_from(bools.len()).unwrap(), bools)
    }

    fn fds(&self, action: u32, index: u32, start: u32, fds: &[i32]) -> Result<i32, Errno> {
        self.set(EVENTFD | action, index, start, u32::try_from(fds.len()).unwrap(), fds.as_bytes())
    }
}

fn with(test: impl FnOnce(&Bench, &TestClient, &Set<'_>)) {
    let (bench, client) = (Bench::open(), TestClient::new());
    bench.set_config(4, &[6, 0]);
    test(&bench, &client, &Set { bench: &bench, client: &client });
    bench.device.disable();
    assert_eq!(bench.controller.taken(), 0, "closing gives every vector back");
    assert_eq!(bench.controller.spurious(), 0, "only vectors that are taken are sent");
}

#[test]
fn msix_goes_from_the_function_to_the_eventfd() {
    with(|bench, client, set| {
        let eventfds = [10, 11].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 11]), Ok(0));
        assert_eq!(bench.controller.taken(), 2);
        assert_eq!(bench.config16(MSIX + 2), 0x8003, "enabled, not masked");
        bench.function.raise_msix(1);
        bench.function.raise_msix(1);
        assert_eq!([eventfds[0].take(), eventfds[1].take()], [0, 2]);
        bench.function.raise_msix(0);
        assert_eq!([eventfds[0].take(), eventfds[1].take()], [1, 0]);
    });
}

#[test]
fn a_vector_without_an_eventfd_is_masked_and_its_interrupt_pending() {
    with(|bench, client, set| {
        let [first, second] = [10, 11].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, -1]), Ok(0));
        bench.function.raise_msix(1);
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 1, &[11]), Ok(0));
        assert_eq!([first.take(), second.take()], [0, 1], "sent when it was unmasked");
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 1, &[-1]), Ok(0));
        bench.function.raise_msix(1);
        assert_eq!(second.take(), 0);
    });
}

#[test]
fn msix_vectors_can_be_added_later() {
    with(|bench, client, set| {
        let [_, last] = [10, 13].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10]), Ok(0));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 3, &[13]), Ok(0));
        assert_eq!(bench.controller.taken(), 2, "those in between are not taken");
        bench.function.raise_msix(3);
        assert_eq!(last.take(), 1);
    });
}

#[test]
fn no_message_leaves_without_bus_mastering() {
    with(|bench, client, set| {
        let eventfd = client.open_eventfd(10);
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10]), Ok(0));
        bench.set_config(4, &[2, 0]);
        bench.function.raise_msix(0);
        assert_eq!(eventfd.take(), 0);
        bench.set_config(4, &[6, 0]);
        assert_eq!(eventfd.take(), 1);
    });
}

#[test]
fn msix_is_programmed_even_while_the_user_has_decoding_off() {
    with(|bench, client, set| {
        let eventfd = client.open_eventfd(10);
        bench.set_config(4, &[4, 0]);
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10]), Ok(0));
        assert_eq!(bench.function.hardware16(4) & 2, 0, "and it stays off");
        bench.function.raise_msix(0);
        assert_eq!(eventfd.take(), 1);
    });
}

#[test]
fn loopback_signals_what_is_named() {
    with(|_, client, set| {
        let eventfds = [10, 11, 12].map(|fd| client.open_eventfd(fd));
        let take = || eventfds.each_ref().map(|eventfd| TestEventFd::take(eventfd));
        assert_eq!(set.none(TRIGGER, MSIX_INDEX, 0, 1), Err(Errno::EINVAL), "not set up");
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 11, 12]), Ok(0));
        assert_eq!(set.none(TRIGGER, MSIX_INDEX, 1, 2), Ok(0));
        assert_eq!(take(), [0, 1, 1]);
        assert_eq!(set.bools(TRIGGER, MSIX_INDEX, 0, &[1, 0, 255, 1]), Ok(0));
        assert_eq!(take(), [1, 0, 1]);
        assert_eq!(set.none(TRIGGER, MSIX_INDEX, 0, 0), Ok(0), "turned off");
        assert_eq!(set.none(TRIGGER, MSIX_INDEX, 0, 1), Err(Errno::EINVAL));
    });
}

#[test]
fn a_bad_descriptor_takes_the_block_down_but_not_the_index() {
    with(|bench, client, set| {
        let eventfds = [10, 11].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 99]), Err(Errno::EBADF));
        assert_eq!(bench.controller.taken(), 0, "it was not set up before, and is not now");
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 11]), Ok(0));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 1, &[99]), Err(Errno::EBADF));
        bench.function.raise_msix(0);
        bench.function.raise_msix(1);
        assert_eq!([eventfds[0].take(), eventfds[1].take()], [1, 0]);
    });
}

#[test]
fn indexes_exclude_each_other() {
    with(|_, client, set| {
        client.open_eventfd(10);
        assert_eq!(set.fds(TRIGGER, MSI_INDEX, 0, &[10]), Ok(0));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10]), Err(Errno::EINVAL));
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Err(Errno::EINVAL));
        assert_eq!(set.none(TRIGGER, MSIX_INDEX, 0, 0), Err(Errno::EINVAL));
        assert_eq!(set.none(TRIGGER, MSI_INDEX, 0, 0), Ok(0));
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Ok(0));
        assert_eq!(set.fds(TRIGGER, MSI_INDEX, 0, &[10]), Err(Errno::EINVAL));
    });
}

#[test]
fn msi_has_as_many_vectors_as_were_enabled() {
    with(|bench, client, set| {
        let eventfds = [10, 11, 12].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSI_INDEX, 0, &[10, 11, 12]), Ok(0));
        assert_eq!(bench.controller.taken(), 3);
        assert_eq!(bench.function.hardware16(MSI + 2) & 0x71, 0x21, "4 messages, enabled");
        assert_eq!(bench.function.hardware16(MSI + 0x10), 0x8, "one of them for nobody");
        for vector in 0..3 {
            bench.function.raise_msi(vector);
        }
        assert_eq!(eventfds.each_ref().map(|eventfd| eventfd.take()), [1, 1, 1]);
        assert_eq!(set.fds(TRIGGER, MSI_INDEX, 3, &[10]), Err(Errno::EINVAL), "not later");
        // The user may turn the messages off in configuration space, and on again.
        bench.set_config(MSI + 2, &[0x20, 0]);
        bench.function.raise_msi(0);
        assert_eq!(eventfds[0].take(), 0);
        bench.set_config(MSI + 2, &[0x71, 0]);
        assert_eq!(bench.config16(MSI + 2) & 0x71, 0x21, "no more than there are");
        bench.function.raise_msi(0);
        assert_eq!(eventfds[0].take(), 1);
    });
}

#[test]
fn a_controller_without_blocks_says_that_one_message_is_possible() {
    let bench = Bench::open_with(Controller::without_blocks(), |_| {});
    let client = TestClient::new();
    client.open_eventfd(10);
    let set = Set { bench: &bench, client: &client };
    assert_eq!(set.fds(TRIGGER, MSI_INDEX, 0, &[10, 10]), Ok(1));
    assert_eq!(bench.controller.taken(), 0);
    assert_eq!(set.fds(TRIGGER, MSI_INDEX, 0, &[10]), Ok(0));
    assert_eq!(bench.controller.taken(), 1);
}

#[test]
fn a_controller_that_is_full_gives_nothing() {
    let bench = Bench::open();
    bench.controller.limit.store(2, Ordering::SeqCst);
    let client = TestClient::new();
    client.open_eventfd(10);
    let set = Set { bench: &bench, client: &client };
    assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 10, 10]), Err(Errno::ENOSPC));
    assert_eq!(bench.controller.taken(), 0);
    assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, 10]), Ok(0));
}

#[test]
fn interrupts_survive_a_reset() {
    with(|bench, client, set| {
        let eventfds = [10, 11].map(|fd| client.open_eventfd(fd));
        assert_eq!(set.fds(TRIGGER, MSIX_INDEX, 0, &[10, -1, 11]), Ok(0));
        let before = bench.function.resets();
        assert_eq!(bench.device.reset(), Ok(()));
        assert_eq!(bench.function.resets(), before + 1);
        bench.function.raise_msix(0);
        bench.function.raise_msix(2);
        assert_eq!(eventfds.each_ref().map(|eventfd| eventfd.take()), [1, 1]);
    });
}

#[test]
fn intx_masks_itself_until_it_is_unmasked() {
    with(|bench, client, set| {
        let eventfd = client.open_eventfd(10);
        bench.device.intx(true);
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Ok(0));
        assert_eq!(eventfd.take(), 1, "it was asserted when it was set up");
        bench.device.intx(false);
        bench.device.intx(true);
        assert_eq!(eventfd.take(), 0, "masked");
        assert_eq!(set.none(UNMASK, INTX, 0, 1), Ok(0));
        assert_eq!(eventfd.take(), 1, "asserted still: once more");
        bench.device.intx(false);
        assert_eq!(set.bools(UNMASK, INTX, 0, &[1]), Ok(0));
        assert_eq!(eventfd.take(), 0);
        assert_eq!(set.bools(MASK, INTX, 0, &[0]), Ok(0));
        bench.device.intx(true);
        assert_eq!(eventfd.take(), 1);
        bench.device.intx(false);
        assert_eq!(set.none(TRIGGER, INTX, 0, 1), Ok(0), "loopback");
        assert_eq!(set.bools(TRIGGER, INTX, 0, &[1]), Ok(0));
        assert_eq!(eventfd.take(), 2);
        assert_eq!(set.none(UNMASK, INTX, 0, 1), Ok(0));
        assert_eq!(set.none(MASK, INTX, 0, 1), Ok(0));
        bench.device.intx(true);
        assert_eq!(eventfd.take(), 0);
        assert_eq!(set.none(TRIGGER, INTX, 0, 0), Ok(0), "turned off");
        assert_eq!(set.none(UNMASK, INTX, 0, 1), Err(Errno::EINVAL));
    });
}

#[test]
fn intx_disable_in_the_command_register_masks() {
    with(|bench, client, set| {
        let eventfd = client.open_eventfd(10);
        bench.set_config(5, &[4]);
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Ok(0));
        bench.device.intx(true);
        assert_eq!(set.none(UNMASK, INTX, 0, 1), Ok(0));
        assert_eq!(set.none(TRIGGER, INTX, 0, 1), Ok(0));
        assert_eq!(eventfd.take(), 0);
        bench.set_config(5, &[0]);
        assert_eq!(eventfd.take(), 1);
    });
}

#[test]
fn an_eventfd_unmasks_intx() {
    with(|bench, client, set| {
        let [signalled, unmask] = [10, 11].map(|fd| client.open_eventfd(fd));
        bench.device.intx(true);
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Ok(0));
        assert_eq!(signalled.take(), 1);
        assert_eq!(set.fds(UNMASK, INTX, 0, &[99]), Err(Errno::EBADF));
        assert_eq!(set.fds(UNMASK, INTX, 0, &[11]), Ok(0));
        assert_eq!(set.fds(UNMASK, INTX, 0, &[11]), Err(Errno::EBUSY));
        unmask.signal_by_client();
        let deadline = Instant::now() + Duration::from_secs(10);
        while signalled.take() == 0 {
            assert!(Instant::now() < deadline, "the interrupt was not unmasked");
            std::thread::yield_now();
        }
        assert_eq!(set.fds(UNMASK, INTX, 0, &[-1]), Ok(0));
        assert_eq!(set.fds(UNMASK, INTX, 0, &[11]), Ok(0));
    });
}

#[test]
fn errors_and_requests_have_one_eventfd_each() {
    with(|_, client, set| {
        let eventfd = client.open_eventfd(10);
        for index in [ERR, REQ] {
            assert_eq!(set.none(TRIGGER, index, 0, 1), Err(Errno::EINVAL), "none is set");
            assert_eq!(set.bools(TRIGGER, index, 0, &[1]), Ok(0));
            assert_eq!(set.fds(TRIGGER, index, 0, &[99]), Err(Errno::EBADF));
            assert_eq!(set.fds(TRIGGER, index, 0, &[10]), Ok(0));
            assert_eq!(set.none(TRIGGER, index, 0, 1), Ok(0));
            assert_eq!(set.bools(TRIGGER, index, 0, &[0]), Ok(0));
            assert_eq!(set.bools(TRIGGER, index, 0, &[1]), Ok(0));
            assert_eq!(eventfd.take(), 2);
            assert_eq!(set.fds(TRIGGER, index, 0, &[-2]), Ok(0), "left as it is");
            assert_eq!(set.fds(TRIGGER, index, 0, &[]), Err(Errno::EINVAL));
            assert_eq!(set.bools(TRIGGER, index, 0, &[]), Err(Errno::EINVAL));
            assert_eq!(set.none(TRIGGER, index, 0, 0), Ok(0), "taken away");
            assert_eq!(set.none(TRIGGER, index, 0, 0), Err(Errno::EINVAL));
            assert_eq!(set.fds(TRIGGER, index, 0, &[10]), Ok(0));
            assert_eq!(set.fds(TRIGGER, index, 0, &[-1]), Ok(0));
            assert_eq!(set.none(TRIGGER, index, 0, 1), Err(Errno::EINVAL));
        }
    });
}

#[test]
fn malformed_requests_are_refused() {
    with(|bench, client, set| {
        client.open_eventfd(10);
        for (flags, index, start, count, errno) in [
            (NONE | TRIGGER, 5, 0, 1, Errno::EINVAL),
            (NONE | TRIGGER | 64, MSIX_INDEX, 0, 1, Errno::EINVAL),
            (TRIGGER, MSIX_INDEX, 0, 1, Errno::EINVAL),
            (NONE | BOOL | TRIGGER, MSIX_INDEX, 0, 1, Errno::EINVAL),
            (NONE | TRIGGER, MSIX_INDEX, 4, 0, Errno::EINVAL),
            (NONE | TRIGGER, MSIX_INDEX, 1, 4, Errno::EINVAL),
            (NONE | TRIGGER, MSIX_INDEX, 1, u32::MAX, Errno::EINVAL),
            (EVENTFD | TRIGGER, MSIX_INDEX, 0, 1, Errno::EINVAL),
            (BOOL | TRIGGER, MSIX_INDEX, 0, 1, Errno::EINVAL),
            (EVENTFD | TRIGGER, MSIX_INDEX, 0, 0, Errno::ERANGE),
            (NONE, MSIX_INDEX, 0, 1, Errno::ENOTTY),
            (NONE | MASK, MSIX_INDEX, 0, 1, Errno::ENOTTY),
            (NONE | UNMASK, MSI_INDEX, 0, 1, Errno::ENOTTY),
            (NONE | MASK, REQ, 0, 1, Errno::ENOTTY),
            (NONE | MASK | UNMASK, INTX, 0, 1, Errno::ENOTTY),
            (NONE | MASK, INTX, 0, 1, Errno::EINVAL),
            (NONE | UNMASK, INTX, 0, 0, Errno::EINVAL),
            (NONE | TRIGGER, INTX, 0, 0, Errno::EINVAL),
            (NONE | TRIGGER, INTX, 0, 1, Errno::EINVAL),
        ] {
            let result = set.set(flags, index, start, count, &[]);
            assert_eq!(result, Err(errno), "{flags:#x} {index} {start} {count}");
        }
        assert_eq!(set.fds(TRIGGER, INTX, 0, &[10]), Ok(0));
        assert_eq!(set.fds(MASK, INTX, 0, &[10]), Err(Errno::ENOTTY));
        let short =
            client.argument(&IrqSet { argsz: 19, flags: NONE | TRIGGER, ..IrqSet::default() });
        assert_eq!(bench.device.set_irqs(client, short).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(bench.device.set_irqs(client, MEMORY - 1).unwrap_err().errno, Errno::EFAULT);
    });
}

#[test]
fn an_eventfd_stores_to_a_bar() {
    with(|bench, client, _| {
        let eventfd = client.open_eventfd(10);
        let call = IoEventFd {
            argsz: 32,
            flags: 4,
            offset: (2 << REGION_SHIFT) + 0x10,
            data: 0x1234_5678,
            fd: 10,
            reserved: 0,
        };
        let ioeventfd = |call: IoEventFd| {
            let argument = client.argument(&call);
            bench.device.ioeventfd(client, argument).map_err(|refusal| refusal.errno)
        };
        for (refused, errno) in [
            (IoEventFd { argsz: 27, ..call }, Errno::EINVAL),
            (IoEventFd { flags: 16, ..call }, Errno::EINVAL),
            (IoEventFd { flags: 3, ..call }, Errno::EINVAL),
            (IoEventFd { fd: -2, ..call }, Errno::EINVAL),
            (IoEventFd { offset: call.offset + BAR2, ..call }, Errno::EINVAL),
            (IoEventFd { offset: 7 << REGION_SHIFT, ..call }, Errno::EINVAL),
            (IoEventFd { offset: TABLE + 8, ..call }, Errno::EINVAL),
            (IoEventFd { fd: 99, ..call }, Errno::EBADF),
            (IoEventFd { fd: -1, ..call }, Errno::ENODEV),
        ] {
            assert_eq!(ioeventfd(refused), Err(errno), "{refused:?}");
        }
        assert_eq!(ioeventfd(call), Ok(()));
        assert_eq!(ioeventfd(call), Err(Errno::EEXIST));
        eventfd.signal_by_client();
        let deadline = Instant::now() + Duration::from_secs(10);
        let seen = loop {
            assert!(Instant::now() < deadline, "nothing was stored");
            match bench.function.seen() {
                seen if seen.is_empty() => std::thread::yield_now(),
                seen => break seen,
            }
        };
        assert_eq!(seen, [Seen::Write { bar: 2, at: 0x10, width: 4 }]);
        assert_eq!(ioeventfd(IoEventFd { fd: -1, ..call }), Ok(()));
    });
}

/// What a program's threads, the function's work and the machine do at the same time.
#[test]
fn threads_do_not_wait_for_each_other_for_ever() {
    const ROUNDS: u32 = 200;
    let (bench, client) = (Bench::open(), TestClient::new());
    bench.set_config(4, &[6, 0]);
    let eventfd = client.open_eventfd(10);
    let (bench, client) = (&bench, &client);
    let finished = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let run = |work: Box<dyn Fn(u32) + Send>| {
            let finished = finished.0.clone();
            scope.spawn(move || {
                (0..ROUNDS).for_each(work);
                finished.send(()).unwrap();
            });
        };
        run(Box::new(move |round| {
            let argument = |offset: u64, set: IrqSet, fds: [i32; 2]| {
                client.put(offset, set.as_bytes());
                client.put(offset + 20, fds.as_bytes());
                bench.device.set_irqs(client, MEMORY + offset)
            };
            let set = IrqSet { argsz: 28, index: MSIX_INDEX, ..IrqSet::default() };
            let fds = if round % 2 == 0 { [10, -1] } else { [-1, 10] };
            let on = IrqSet { flags: EVENTFD | TRIGGER, count: 2, ..set };
            assert_eq!(argument(0x100, on, fds), Ok(0));
            if round % 8 == 7 {
                assert_eq!(argument(0x100, IrqSet { flags: NONE | TRIGGER, ..set }, fds), Ok(0));
            }
        }));
        run(Box::new(move |round| bench.function.raise_msix(if round % 2 == 0 { 0 } else { 1 })));
        run(Box::new(move |round| bench.device.intx(round % 2 == 0)));
        run(Box::new(move |round| {
            bench.set_config(4, &[if round % 2 == 0 { 4 } else { 6 }, 0]);
            bench.config::<64>(0);
        }));
        run(Box::new(move |_| assert_eq!(bench.device.reset(), Ok(()))));
        for _ in 0..5 {
            finished.1.recv_timeout(Duration::from_secs(60)).expect("all come to an end");
        }
    });
    bench.device.disable();
    assert_eq!(bench.controller.taken(), 0);
    eventfd.take();
}
