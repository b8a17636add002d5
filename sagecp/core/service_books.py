"""What each tenant was served: one account per model, class and tenant."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestPriority

DEFAULT_ACCOUNT_LIMIT = 20_000

_INITIAL_MEAN_COST_S = 1.0
_FORGET_SCAN_COUNT = 8


class LaneKey(NamedTuple):
    """Whose shares are compared: the tenants that wait for one model in one class."""

    model: str
    priority: RequestPriority


@dataclass(eq=False, slots=True)
class Account:
    """What one tenant has had of one model in one class.

    Attributes:
        standing_s: Engine seconds charged, divided by the tenant's weight, on
            the lane's common scale: the smallest standing is served first.
        floor_s: The scale when the tenant last began to wait. A refund goes no
            lower, or an earlier misprediction would be credit saved up.
        running_count: Requests that are dispatched and not settled.
    """

    standing_s: float = 0.0
    floor_s: float = 0.0
    running_count: int = 0


class Charge(NamedTuple):
    """What an attempt was charged: settled by the same account and weight, whatever changes meanwhile.

    Attributes:
        account: Of its tenant.
        weight: Of its tenant, at the dispatch.
        cost_s: Predicted engine seconds.
    """

    account: Account
    weight: float
    cost_s: float


class Ledger:
    """What one lane has in common.

    Attributes:
        last_to_leave: Account of the tenant whose request emptied the lane.
        mean_cost_s: Moving average of what a dispatch costs, engine seconds.
    """

    __slots__ = ("last_to_leave", "mean_cost_s")

    def __init__(self) -> None:
        self.last_to_leave: Account | None = None
        self.mean_cost_s = _INITIAL_MEAN_COST_S


class ServiceBooks:
    """Who has had how much service: outlives the lines, which come and go with their requests.

    Each lane has its own scale. One scale for all would let a tenant that used
    an idle model (or an idle night's background class) starve where others
    wait, for as long as it had been served where nobody did.

    The least recently used account is forgotten first; one with requests
    running is spared until there are twice the limit. Lines hold the accounts
    of waiting tenants themselves. A forgotten tenant starts again as a newcomer.

    Args:
        account_limit: Most accounts to remember, at least 1.
    """

    def __init__(self, account_limit: int = DEFAULT_ACCOUNT_LIMIT) -> None:
        self._account_limit = account_limit
        self._accounts: OrderedDict[tuple[LaneKey, str], Account] = OrderedDict()
        self._ledgers: OrderedDict[LaneKey, Ledger] = OrderedDict()
        # By request id: at most one attempt of a request runs.
        self._charges: dict[str, Charge] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def account(self, lane: LaneKey, tenant: str) -> Account:
        """Return a tenant's account, a new one if there is none."""
        account = self._accounts.get((lane, tenant)) or Account()
        self.keep(lane, tenant, account)
        return account

    def keep(self, lane: LaneKey, tenant: str, account: Account) -> None:
        """Remember an account as the one used last."""
        accounts = self._accounts
        accounts[lane, tenant] = account
        accounts.move_to_end((lane, tenant))
        # Never as far as the account that was just put last.
        for _ in range(min(_FORGET_SCAN_COUNT, len(accounts) - 1)):
            if len(accounts) <= self._account_limit:
                return
            oldest_key, oldest = accounts.popitem(last=False)
            if oldest.running_count and len(accounts) < 2 * self._account_limit:
                accounts[oldest_key] = oldest

    def charge(self, record: RequestRecord, account: Account, weight: float, cost_s: float) -> None:
        """Charge what an attempt will probably cost, until :meth:`settle`.

        Args:
            record: The request, which has no charge that is not settled.
            account: Of its tenant.
            weight: Of its tenant, greater than 0.
            cost_s: Predicted engine seconds: uncached prefill and its share of decode steps.
        """
        account.standing_s += cost_s / weight
        account.running_count += 1
        self._charges[record.request_id] = Charge(account, weight, cost_s)
        self.keep(lane_key(record), tenant_of(record), account)

    def settle(self, record: RequestRecord, actual_cost_s: float) -> bool:
        """Charge or refund the difference between what an attempt cost and what it was charged.

        Args:
            record: The request, whose attempt has ended.
            actual_cost_s: Engine seconds that it cost.

        Returns:
            Whether it was charged at all: under some policies nobody is.
        """
        charge = self._charges.pop(record.request_id, None)
        if charge is None:
            return False
        account = charge.account
        corrected_s = account.standing_s + (actual_cost_s - charge.cost_s) / charge.weight
        account.standing_s = max(account.floor_s, corrected_s)
        account.running_count -= 1
        key = (lane_key(record), tenant_of(record))
        # One that was forgotten meanwhile does not come back.
        if self._accounts.get(key) is account:
            self._accounts.move_to_end(key)
        return True

    def ledger(self, lane: LaneKey) -> Ledger:
        """Return what a lane has in common."""
        ledger = self._ledgers.get(lane)
        if ledger is None:
            ledger = self._ledgers[lane] = Ledger()
            if len(self._ledgers) > self._account_limit:
                self._ledgers.popitem(last=False)
        else:
            self._ledgers.move_to_end(lane)
        return ledger


def tenant_of(record: RequestRecord) -> str:
    """Return whose share pays for a request."""
    return record.metadata.paying_tenant


def lane_key(record: RequestRecord) -> LaneKey:
    """Return with whose shares its own is compared."""
    return LaneKey(record.model, record.metadata.priority)
