import { Title } from '@mantine/core';
import { useEffect, type ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import css from './Page.module.css';

interface Props {
  title: string;
  lead?: string;
  actions?: ReactNode;
  above?: ReactNode;
  children: ReactNode;
  wide?: boolean;
}

/** One screen: its heading, what it is for, what can be done, and its content. */
export function Page({ title, lead, actions, above, children, wide = false }: Props) {
  useTitle(title);
  return (
    <div className={wide ? css.wide : css.page}>
      {above}
      <div className={css.head}>
        <div>
          <Title order={1}>{title}</Title>
          {lead ? <p className={css.lead}>{lead}</p> : null}
        </div>
        {actions ? <div className={css.actions}>{actions}</div> : null}
      </div>
      {children}
    </div>
  );
}

export function useTitle(title: string): void {
  const { t } = useTranslation();
  const name = t('app.name');
  useEffect(() => {
    document.title = `${title} · ${name}`;
  }, [title, name]);
}

export function Card({ children, title }: { children: ReactNode; title?: ReactNode }) {
  return (
    <section className={css.card}>
      {title ? <Title order={2}>{title}</Title> : null}
      {children}
    </section>
  );
}
