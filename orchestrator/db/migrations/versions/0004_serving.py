"""What serving needs to know: tenants that are disabled, bases of imported adapters, and what an alias named before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ALIASES = sa.table("adapter_aliases", *map(sa.column, ("tenant", "name", "alias", "previous")))
MOVES = """
SELECT CAST(before AS VARCHAR), CAST(after AS VARCHAR) FROM audit
WHERE subject = :subject AND action = 'alias.move' ORDER BY seq
"""


def upgrade() -> None:
    op.add_column("tenants", sa.Column("disabled_at", sa.Double()))
    op.add_column("adapter_aliases", sa.Column("previous", sa.Integer()))
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("run_id", existing_type=sa.String(80), nullable=True)
    _fill_previous(op.get_bind())


def _fill_previous(connection: sa.Connection) -> None:
    """From the audit trail, as `registry.versions` does since: a move back leads to what was before that, too."""
    for tenant, name, alias in connection.execute(sa.text("SELECT tenant, name, alias FROM adapter_aliases")).all():
        way: list[str] = []
        for before, after in connection.execute(sa.text(MOVES), {"subject": f"{tenant}/{name}@{alias}"}):
            way = [] if before is None else way
            way = [*way[: way.index(after)], after] if after in way else [*way, after]
        if len(way) > 1:
            this = (ALIASES.c.tenant == tenant, ALIASES.c.name == name, ALIASES.c.alias == alias)
            connection.execute(sa.update(ALIASES).where(*this).values(previous=int(way[-2])))


def downgrade() -> None:
    op.execute("DELETE FROM adapters WHERE run_id IS NULL")
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("run_id", existing_type=sa.String(80), nullable=False)
    op.drop_column("adapter_aliases", "previous")
    op.drop_column("tenants", "disabled_at")
