import { Page } from '@/components/Page';
import { SegmentedControl } from '@mantine/core';
import type { ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { useLocation, useNavigate } from 'react-router';

const VIEWS = { '/people': 'people.list', '/people/audit': 'people.audit' } as const;

interface Props {
  title: string;
  lead: string;
  actions?: ReactNode;
  children: ReactNode;
}

/** One of the admin's screens, and the way to the others. */
export function AdminPage({ title, lead, actions, children }: Props) {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const { pathname } = useLocation();
  return (
    <Page title={title} lead={lead} actions={actions}>
      <SegmentedControl
        aria-label={t('people.views')}
        value={pathname}
        onChange={(path) => void navigate(path)}
        data={Object.entries(VIEWS).map(([value, words]) => ({ value, label: t(words) }))}
        mb="lg"
      />
      {children}
    </Page>
  );
}
