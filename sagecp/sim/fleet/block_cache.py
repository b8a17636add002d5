"""A paged KV cache with prefix sharing that counts blocks instead of naming them.

It behaves like :class:`sagecp.sim.kv_cache.KvCache`, seen through block
contents: a block is either *known*, found under the id of its contents, or
*anonymous*, and of anonymous blocks only the number matters. Unheld known
blocks keep their contents in least-recently-freed order until room is needed;
blocks without contents are always given away before them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile


class FreedContents:
    """The contents of blocks that nobody holds, in least-recently-freed order.

    What one holder frees stays together in a group, so that most of the work
    is done on slices of lists and not block by block. A content that is held
    again is only struck off; its place in the group goes when the group is
    looked at, or when more than half of it is struck off.
    """

    __slots__ = ("_group_of", "_groups", "_serial", "_struck_counts")

    def __init__(self) -> None:
        self._serial = 0
        # Oldest first. Of a group, the end is given away first.
        self._groups: OrderedDict[int, list[int]] = OrderedDict()
        self._struck_counts: dict[int, int] = {}
        self._group_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def count_in(self, contents: Iterable[int]) -> int:
        """Return how many of these are freed."""
        return sum(map(self._group_of.__contains__, contents))

    def __contains__(self, content: int) -> bool:
        return content in self._group_of

    def add(self, contents: list[int]) -> None:
        """Free contents, the last to be given away first; the list is this object's from now on."""
        if contents:
            self._serial = serial = self._serial + 1
            self._groups[serial] = contents
            self._group_of.update(dict.fromkeys(contents, serial))

    def strike(self, contents: Iterable[int]) -> None:
        """Take out contents that are held again."""
        for serial, new_count in Counter(map(self._group_of.pop, contents)).items():
            count = new_count + self._struck_counts.get(serial, 0)
            self._struck_counts[serial] = count
            if 2 * count > len(self._groups[serial]):
                self._compact(serial)

    def pop(self, count: int) -> list[int]:
        """Take out and return the ones to be given away next, in no special order; there must be so many."""
        groups, group_of = self._groups, self._group_of
        gone: list[int] = []
        while count:
            serial = next(iter(groups))
            if serial in self._struck_counts:
                self._compact(serial)
            group = groups[serial]
            if len(group) <= count:
                del groups[serial]
                part = group
            else:
                part = group[-count:]
                del group[-count:]
            count -= len(part)
            gone += part
        for content in gone:
            del group_of[content]
        return gone

    def _compact(self, serial: int) -> None:
        """Drop what was struck off a group, and a group of which nothing is left."""
        del self._struck_counts[serial]
        group, group_of = self._groups[serial], self._group_of
        group[:] = [content for content in group if group_of.get(content) == serial]
        if not group:
            del self._groups[serial]

    def check(self) -> None:
        """Verify the bookkeeping; for tests.

        Raises:
            AssertionError: Something does not add up.
        """
        live = 0
        for serial, group in self._groups.items():
            live_here = sum(self._group_of.get(content) == serial for content in group)
            if live_here != len(group) - self._struck_counts.get(serial, 0) or 2 * live_here < len(group):
                raise AssertionError(f"group {serial} has {live_here} of {len(group)} contents")
            live += live_here
        if live != len(self._group_of) or not self._struck_counts.keys() <= self._groups.keys():
            raise AssertionError("a freed content is in no group")


class BlockCache:
    """Blocks, the holders of known contents, and the contents that freed blocks still have.

    A holder keeps a list of the known contents that it holds, without
    repetition, and derives its number of anonymous blocks from its length.

    Args:
        block_count: Blocks in the cache.

    Attributes:
        block_count: Blocks in the cache.
        blank_block_count: Blocks that nobody holds and that have no contents.
    """

    __slots__ = ("_further_holders", "_known", "_unheld", "blank_block_count", "block_count")

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise ValueError(f"a cache of {block_count} blocks cannot hold anything")
        self.block_count = block_count
        self.blank_block_count = block_count
        self._known: set[int] = set()  # never iterated
        self._unheld = FreedContents()
        # How many hold a known content beside the first, where any do: most have one holder.
        self._further_holders: dict[int, int] = {}

    @property
    def free_block_count(self) -> int:
        """Blocks that nobody holds, whether or not they still have contents."""
        return self.blank_block_count + len(self._unheld)

    @property
    def used_block_count(self) -> int:
        """Blocks that somebody holds."""
        return self.block_count - self.blank_block_count - len(self._unheld)

    @property
    def known_block_count(self) -> int:
        """Blocks that can be found by their contents, held or not."""
        return len(self._known)

    def match(self, contents: Sequence[int], limit: int) -> list[int]:
        """Return the first contents up to one that is not known, at most so many."""
        return list(takewhile(self._known.__contains__, islice(contents, limit)))

    def knows_any(self, contents: Iterable[int]) -> bool:
        """Return whether any of these contents is known."""
        return not self._known.isdisjoint(contents)

    def unheld_count(self, contents: Sequence[int]) -> int:
        """Return how many of these contents are known and nobody's."""
        return self._unheld.count_in(contents)

    def open(self, contents: Sequence[int], anonymous_block_count: int) -> bool:
        """Hold known contents and so many anonymous blocks; return False, and change nothing, without room.

        Args:
            contents: What :meth:`match` returned, with nothing freed or taken since.
            anonymous_block_count: Blocks beside those.
        """
        # Reviving a block costs a free one, too.
        revived_block_count = self._unheld.count_in(contents) if contents else 0
        if anonymous_block_count + revived_block_count > self.free_block_count:
            return False
        if contents:
            unheld = self._unheld
            revived = contents
            if revived_block_count < len(contents):
                revived = [content for content in contents if content in unheld]
                further = self._further_holders
                for content in contents:
                    if content not in unheld:
                        further[content] = further.get(content, 0) + 1
            unheld.strike(revived)
        self.take(anonymous_block_count)
        return True

    def take(self, block_count: int) -> None:
        """Hold so many anonymous blocks. The caller knows that so many are free."""
        if block_count <= self.blank_block_count:
            self.blank_block_count -= block_count
        else:
            self._known.difference_update(self._unheld.pop(block_count - self.blank_block_count))
            self.blank_block_count = 0

    def commit(self, contents: Sequence[int], held: list[int]) -> None:
        """Make a holder's anonymous blocks known by these contents, and note them in its list.

        Contents that are known already stay where they are: the copy remains anonymous.
        """
        known = self._known
        if not known.isdisjoint(contents):
            contents = [content for content in contents if content not in known]
        known.update(contents)
        held += contents

    def close(self, held: list[int], anonymous_block_count: int) -> None:
        """Take back a holder's blocks; of the known ones, the end of the sequence is given away first.

        The list is the cache's from now on.
        """
        self.blank_block_count += anonymous_block_count
        further = self._further_holders
        if further and not further.keys().isdisjoint(held):
            freed = []
            for content in held:
                count = further.get(content, 0)
                if not count:
                    freed.append(content)
                elif count == 1:
                    del further[content]
                else:
                    further[content] = count - 1
            held = freed
        self._unheld.add(held)

    def check(self) -> None:
        """Verify the bookkeeping; for tests.

        Raises:
            AssertionError: Something does not add up.
        """
        self._unheld.check()
        known_unheld_count = self._unheld.count_in(self._known)
        if known_unheld_count != len(self._unheld) or not self._known.issuperset(self._further_holders):
            raise AssertionError("a content is in the books that is not known")
        if self._unheld.count_in(self._further_holders):
            raise AssertionError("a content is held and is not")
        if self.blank_block_count < 0 or min(self._further_holders.values(), default=1) < 1:
            raise AssertionError("something is held less than not at all")
        if self.blank_block_count + len(self._known) > self.block_count:
            raise AssertionError("there are more blocks than the cache has")
