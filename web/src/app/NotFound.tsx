import { Empty } from '@/components/Empty';
import { Button } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';

export function NotFound() {
  const { t } = useTranslation();
  return (
    <Empty title={t('notFound.title')} text={t('notFound.text')} level={1}>
      <Button component={Link} to="/">
        {t('notFound.home')}
      </Button>
    </Empty>
  );
}
