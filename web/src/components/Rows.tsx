import { Fragment, type ReactNode } from 'react';
import css from './Rows.module.css';

/** A list of things: each with its name, what marks it, what else is known of it, and what can be done. */
export function Rows({ label, children }: { label: string; children: ReactNode }) {
  return (
    <ul className={css.list} aria-label={label}>
      {children}
    </ul>
  );
}

interface Props {
  name: ReactNode;
  marks?: ReactNode;
  facts: readonly (ReactNode | null)[]; // null: does not apply
  children?: ReactNode;
}

export function Row({ name, marks, facts, children }: Props) {
  const told = facts.filter((fact) => fact !== null);
  return (
    <li className={css.row}>
      <div className={css.words}>
        <div className={css.name}>
          <span>{name}</span>
          {marks}
        </div>
        <div className={css.more}>
          {told.map((fact, i) => (
            <Fragment key={i}>
              {i > 0 ? ' · ' : null}
              <span>{fact}</span>
            </Fragment>
          ))}
        </div>
      </div>
      {children}
    </li>
  );
}
