import type { ReactNode } from 'react';
import css from './Fold.module.css';
import { Icon } from './Icon';

/** Something that most people leave alone. `mark`: it holds something, though it is folded. */
export function Fold({
  title,
  children,
  mark = false,
  open = false,
}: {
  title: string;
  children: ReactNode;
  mark?: boolean;
  open?: boolean;
}) {
  return (
    <details className={css.fold} open={open}>
      <summary className={css.title}>
        <span className={css.chevron}>
          <Icon name="chevron" size={18} />
        </span>
        {title}
        {mark ? <span className={css.mark} /> : null}
      </summary>
      <div className={css.content}>{children}</div>
    </details>
  );
}
